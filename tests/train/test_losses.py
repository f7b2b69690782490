"""Preference losses as settings: what a plan says, what is refused and how, and that planning needs no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from pipeline.algo.preference import LOSSES, SimPo, make_loss
from pipeline.flow.config import Settings, parse_settings
from pipeline.flow.errors import UserError
from pipeline.train.losses import SETTINGS, AnyLoss, default_loss


class Config(Settings):
    loss: AnyLoss = default_loss("sigmoid")


def parsed(**loss: Any) -> Any:
    return parse_settings(Config, {"loss": loss}, "settings.dpo").loss


@pytest.mark.parametrize("name", LOSSES)
def test_settings_are_the_losss_own_fields(name: str) -> None:
    model = SETTINGS[name].model_fields
    assert set(model) == {"name", *(f.name for f in fields(LOSSES[name]))}
    for f in fields(LOSSES[name]):
        assert model[f.name].description == f.metadata["help"]
    assert parsed(name=name).made() == make_loss(name) == default_loss(name).made()


def test_a_loss_is_made_from_what_was_given() -> None:
    assert parsed(name="simpo", beta=2.5, gamma=1.5).made() == SimPo(beta=2.5, gamma=1.5)
    assert parsed(beta=0.3).made() == make_loss("sigmoid", beta=0.3)  # the default loss, where none is named
    assert parsed(name="ipo", length_normalised=True).identity() == {
        "name": "ipo", "beta": 0.1, "length_normalised": True, "sft_coefficient": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "simpo", "label_smoothing": 0.1}, "the loss simpo has no label_smoothing; it has: beta, gamma, sft_"),
        ({"gamma": 1.0}, "the loss sigmoid has no gamma; it has: beta, label_smoothing, sft_coefficient"),
        (
            {"name": "dpo"},
            r"loss\.name: expected 'sigmoid', 'robust', 'ipo', .*'kto', found 'dpo'; did you mean 'ipo'\?$",
        ),
        ({"name": "ipo", "beta": 0}, r"settings\.dpo\.loss\.beta: Input should be greater than 0 \(given: 0\)"),
        ({"name": "robust", "label_smoothing": 0.5}, r"loss\.label_smoothing: Input should be less than 0.5"),
        ({"name": "kto", "beta": True}, r"loss\.beta: Input should be a valid number \(given: True\)"),
        ({"name": "simpo", "gamma": float("nan")}, "finite"),
    ],
)
def test_what_a_loss_does_not_have_is_refused(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(**loss)


def test_no_torch_for_settings() -> None:
    code = "import sys, stages.dpo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
