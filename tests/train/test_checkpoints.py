"""State of a row in progress: written whole, verified, never silently lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.flow.errors import Damaged, UserError
from pipeline.train.checkpoints import Checkpoints, restore_trainer, trainer_tensors
from pipeline.train.loop import Trainer
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build
from tests.train.tiny import Tiny, next_token, records

RANKS = build(device="cpu")


def trainer(seed: int = 0) -> Trainer:
    return Trainer(Tiny(), next_token, TrainSettings(learning_rate=0.01), RANKS, total=3, seed=seed)


def step(made: Trainer) -> None:
    work = records(4)
    made.step(work, {"tokens": float(sum(len(g[0].ids) - 1 for g in work))})


def checkpoints(directory: Path, identity: str = "a" * 64, **more: Any) -> Checkpoints:
    return Checkpoints(directory / "checkpoints", identity, RANKS, **more)


def saved(directory: Path, *steps: int, **more: Any) -> Checkpoints:
    made = checkpoints(directory, **more)
    for step in steps:
        made.save(step, {"w": torch.full((3,), float(step))}, {"iteration": step, "kl": 0.1})
    return made


def test_what_was_saved_comes_back_exactly(tmp_path: Path):
    value = torch.tensor([0.1, 1e-30, 3.0])
    checkpoints(tmp_path).save(7, {"w": value, "step": torch.tensor(2.0)}, {"x": 0.1 + 0.2})
    found = checkpoints(tmp_path).newest(print)
    assert found is not None and found.step == 7 and found.state == {"x": 0.1 + 0.2}
    assert torch.equal(found.tensors["w"], value) and float(found.tensors["step"]) == 2.0


def test_the_newest_ones_stay(tmp_path: Path):
    made = saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(p.name for p in made.directory.iterdir()) == ["step-000002", "step-000003"]


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path: Path):
    assert checkpoints(tmp_path).newest(print) is None
    (tmp_path / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)  # killed while writing
    assert checkpoints(tmp_path).newest(print) is None


@pytest.mark.parametrize("what", ["flipped", "shortened", "gone", "manifest", "empty manifest"])
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, what: str):
    made = saved(tmp_path, 1, 2)
    place = made.directory / "step-000002"
    if what == "flipped":
        data = bytearray((place / "tensors.safetensors").read_bytes())
        data[-1] ^= 1
        (place / "tensors.safetensors").write_bytes(bytes(data))
    elif what == "shortened":
        (place / "state.json").write_text("{")
    elif what == "gone":
        (place / "tensors.safetensors").unlink()
    elif what == "manifest":
        (place / "manifest.json").unlink()
    else:
        (place / "manifest.json").write_text("[]")
    said: list[str] = []
    found = made.newest(said.append)
    assert found is not None and found.step == 1
    assert "step-000002" in said[0] and "trying the one before it" in said[0]
    (made.directory / "step-000001" / "state.json").unlink()
    with pytest.raises(Damaged, match="no checkpoint verifies"):
        made.newest(said.append)


def test_a_checkpoint_of_another_row_is_not_taken(tmp_path: Path):
    saved(tmp_path, 1)
    with pytest.raises(Damaged, match="belongs to another row"):
        checkpoints(tmp_path, "b" * 64).newest(print)


def test_another_number_of_processes_is_refused(tmp_path: Path):
    made = saved(tmp_path, 1)
    path = made.directory / "step-000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "world": 4}))
    with pytest.raises(UserError, match="written by 4 processes, now there are 1"):
        made.newest(print)


def test_a_trainer_goes_on_with_the_same_bits(tmp_path: Path):
    """Weights and both moments with their step: three updates at once, or two, a stop, and one."""
    whole, first = trainer(), trainer()
    for _ in range(3):
        step(whole)
    for _ in range(2):
        step(first)
    checkpoints(tmp_path).save(2, trainer_tensors(first), {})
    found = checkpoints(tmp_path).newest(print)
    second = trainer()
    assert found is not None
    restore_trainer(second, found.tensors, 2)
    step(second)
    for a, b in zip(second.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Damaged, match="holds no"):
        restore_trainer(second, {}, 2)
