from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from pipeline.flow.config import Settings
from pipeline.train.settings import TrainSettings


def test_no_torch_is_imported_to_read_settings() -> None:
    code = "import sys, pipeline.train.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_setting_has_one_plain_sentence() -> None:
    for name, field in TrainSettings.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_what_only_costs_memory_and_time_is_not_identity() -> None:
    assert TrainSettings(token_budget=64, checkpointing=True).identity() == TrainSettings().identity()
    assert TrainSettings(batch=3).identity() != TrainSettings().identity()


def test_younger_settings_are_no_part_of_identity_at_their_defaults() -> None:
    younger = {"batch_start", "batch_growth", "cooldown", "skip_spikes", "spike_window"}
    found = TrainSettings().identity()
    assert not younger & set(found)
    assert TrainSettings(skip_spikes=6.0).identity() == found | {"skip_spikes": 6.0}


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0},
        {"betas": [0.9, 1.0]},
        {"token_budget": 0},
        {"batch": 0},
        {"precision": "fp16"},
        {"steps": 10**20},
        {"schedule": "wsd", "final_fraction": 0.0},
        {"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6},
        {"cooldown": 0.2},
        {"batch_tokens": 100, "batch_start": 10},
        {"batch_tokens": 100, "batch_growth": 10},
        {"batch_start": 10, "batch_growth": 10},
        {"batch_tokens": 100, "batch_start": 100, "batch_growth": 10},
        {"skip_spikes": 0},
        {"spike_window": 64},
    ],
)
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainSettings(**bad)


def test_a_stage_keeps_its_own_defaults_beside_what_is_set() -> None:
    class Stage(Settings):
        train: TrainSettings = TrainSettings(learning_rate=0.5, batch=64)

    assert Stage.model_validate({"train": {"steps": 2}}).train == TrainSettings(learning_rate=0.5, batch=64, steps=2)
    assert Stage.model_validate({"train": {"batch": 8}}).train.learning_rate == 0.5
    assert Stage().train.batch == 64 and TrainSettings().batch != 64
