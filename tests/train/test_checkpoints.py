"""State of a row in progress: written whole, verified, never silently lost."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.flow.errors import Damaged, RowFailed, UserError
from pipeline.train.checkpoints import Checkpoints
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
    made.finish()
    return made


def test_what_was_saved_comes_back_exactly(tmp_path: Path):
    value = torch.tensor([0.1, 1e-30, 3.0])
    made = checkpoints(tmp_path)
    made.save(7, {"w": value, "step": torch.tensor(2.0)}, {"x": 0.1 + 0.2, "y": [math.nan, -math.inf]})
    value_then = value.clone()
    value.fill_(0.0)  # training goes on while it is written
    made.finish()
    found = checkpoints(tmp_path).newest(print)
    assert found is not None and found.step == 7 and found.state["x"] == 0.1 + 0.2
    assert math.isnan(found.state["y"][0]) and found.state["y"][1] == -math.inf
    assert torch.equal(found.tensors["w"], value_then) and float(found.tensors["step"]) == 2.0


def test_the_newest_ones_stay(tmp_path: Path):
    made = saved(tmp_path, 1, 2, 3, keep=2)
    assert sorted(p.name for p in made.directory.iterdir()) == ["step-000002", "step-000003"]


def test_steps_are_numbers_not_names(tmp_path: Path):
    made = saved(tmp_path, 999_800, 999_900, 1_000_000, 1_000_100, keep=2)
    assert made.newest(print).step == 1_000_100  # type: ignore[union-attr]
    assert sorted(p.name for p in made.directory.iterdir()) == ["step-1000000", "step-1000100"]


def test_one_saved_below_a_damaged_one_stays(tmp_path: Path):
    made = saved(tmp_path, 90, 100)
    (made.directory / "step-000100" / "state.json").unlink()
    saved(tmp_path, 95, keep=1)  # gone on with from 90, at another interval
    assert [p.name for p in made.directory.iterdir()] == ["step-000095"]


def test_weights_that_lie_in_another_order_are_refused(tmp_path: Path):
    saved(tmp_path, 1, layout="deepspeed, zero_stage 2")
    with pytest.raises(UserError, match="its weights lie as deepspeed, zero_stage 2, now as whole"):
        checkpoints(tmp_path).newest(print)


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path: Path):
    assert checkpoints(tmp_path).newest(print) is None
    (tmp_path / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)  # killed while writing
    assert checkpoints(tmp_path).newest(print) is None


@pytest.mark.parametrize(
    "what", ["flipped", "shortened", "gone", "manifest", "empty manifest", "more", "pipe", "link", "deep", "step"]
)
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
    elif what == "more":
        (place / "other.json").write_text("{}")
    elif what == "pipe":
        (place / "state.json").unlink()
        os.mkfifo(place / "state.json")
    elif what == "link":
        (place / "state.json").rename(tmp_path / "elsewhere.json")
        (place / "state.json").symlink_to(tmp_path / "elsewhere.json")
    elif what == "deep":
        (place / "manifest.json").write_text("[" * 100_000)
    elif what == "step":
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps({**manifest, "step": 3}))
    else:
        (place / "manifest.json").write_text("[]")
    said: list[str] = []
    found = made.newest(said.append)
    assert found is not None and found.step == 1
    assert "step-000002" in said[0] and "trying the one before it" in said[0]
    (made.directory / "step-000001" / "state.json").unlink()
    with pytest.raises(Damaged, match="no checkpoint verifies .*; rm -rf .* and run the same command again"):
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


def test_what_a_killed_save_left_is_cleared_and_a_damaged_one_replaced(tmp_path: Path):
    made = saved(tmp_path, 1, 2)
    for name in (".tmp-step-000003", ".trash-step-000001"):
        (made.directory / name).mkdir()
        (made.directory / name / "tensors.safetensors").write_text("half")
    (made.directory / "step-000002" / "state.json").unlink()
    again = checkpoints(tmp_path)
    assert again.newest(lambda _: None).step == 1  # type: ignore[union-attr]
    saved(tmp_path, 2)
    assert sorted(p.name for p in made.directory.iterdir()) == ["step-000001", "step-000002"]
    assert again.newest(print).step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_told_and_the_last_good_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    made = saved(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    made.save(2, {"w": torch.zeros(1_000_000)}, {})
    with pytest.raises(
        RowFailed, match=r"step-000002: cannot be written \(No space left.*needs 4 MB and \d+ MB are free"
    ):
        made.finish()
    monkeypatch.undo()
    assert [p.name for p in made.directory.iterdir()] == ["step-000001"]
    assert made.newest(print).step == 1  # type: ignore[union-attr]


def test_a_trainer_goes_on_with_the_same_bits(tmp_path: Path):
    """Weights and both moments with their step: three updates at once, or two, a stop, and one."""
    whole, first = trainer(), trainer()
    for _ in range(3):
        step(whole)
    for _ in range(2):
        step(first)
    made = checkpoints(tmp_path)
    made.save(2, first.state(), {})
    made.finish()
    found = checkpoints(tmp_path).newest(print)
    second = trainer()
    assert found is not None
    second.load_state(found.tensors, 2)
    step(second)
    for a, b in zip(second.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "left_out", ["model.norm.weight", "exp_avg.norm.weight", "exp_avg_sq.head.weight", "step.head.weight"]
)
def test_no_part_of_the_state_may_be_missing(left_out: str):
    made = trainer()
    step(made)
    tensors = {name: tensor for name, tensor in made.state().items() if name != left_out}
    with pytest.raises(Damaged, match=f"does not hold {left_out.partition('.')[2]} of shape"):
        trainer().load_state(tensors, 1)
    wrong = {**made.state(), "exp_avg.norm.weight": torch.zeros(3)}
    with pytest.raises(Damaged, match="does not hold norm.weight"):
        trainer().load_state(wrong, 1)


class Team:
    """Two ranks as two threads of this process; `gather` is where they meet."""

    def __init__(self) -> None:
        self.meeting, self.told = threading.Barrier(2, timeout=30), [None, None]  # type: threading.Barrier, list[Any]

    def rank(self, number: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self.told[number] = value
            self.meeting.wait()
            found = list(self.told)
            self.meeting.wait()
            return found

        return SimpleNamespace(rank=number, world=2, main=number == 0, gather=gather, barrier=lambda: gather(None))

    def all(self, act: Any) -> list[Any]:
        """What `act(rank number)` returned or raised on each."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(act, number) for number in range(2)]
            return [future.exception() or future.result() for future in futures]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Team, list[Checkpoints]]:
    team = Team()
    ranks = [team.rank(number) for number in range(2)]
    return team, [Checkpoints(tmp_path / "checkpoints", "a" * 64, rank, layout="parts") for rank in ranks]


def save(made: list[Checkpoints], step: int) -> Any:
    return lambda number: made[number].save(step, {"w": torch.full((3,), float(10 * step + number))}, {"step": step})


def held_back(made: list[Checkpoints], monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Rank 1's part of every save is written after `act`."""
    write = made[1]._write
    monkeypatch.setattr(made[1], "_write", lambda *arguments: (act(), write(*arguments)))


def test_parts_are_written_while_training_goes_on(parts: Any, monkeypatch: pytest.MonkeyPatch):
    team, made = parts
    wait = threading.Event()
    held_back(made, monkeypatch, wait.wait)
    assert team.all(save(made, 1)) == [None, None]  # both have gone on
    time.sleep(0.1)
    assert not list(made[0].directory.glob("step-*"))
    wait.set()
    assert team.all(lambda number: made[number].finish()) == [None, None]
    assert team.all(save(made, 2)) == [None, None]
    assert team.all(lambda number: made[number].finish()) == [None, None]
    place = made[0].directory / "step-000002"
    assert sorted(p.name for p in place.iterdir()) == [
        "manifest.json", "state.json", "tensors-00001.safetensors", "tensors.safetensors",
    ]  # fmt: skip
    for number in range(2):
        found = made[number].newest(print)
        assert found.step == 2 and found.tensors["w"].tolist() == [20.0 + number] * 3


def test_a_part_that_cannot_be_written_is_told_by_all_and_the_last_good_one_stays(
    parts: Any, monkeypatch: pytest.MonkeyPatch
):
    team, made = parts
    team.all(save(made, 1))

    def full() -> None:
        raise RowFailed("checkpoint: no space left on rank 1")

    held_back(made, monkeypatch, full)
    assert team.all(save(made, 2)) == [None, None]  # and the first one is complete
    problems = team.all(lambda number: made[number].finish())
    assert [str(p) for p in problems] == ["checkpoint: no space left on rank 1"] * 2
    assert sorted(p.name for p in made[0].directory.iterdir()) == ["step-000001"]
    assert made[1].newest(print).step == 1


def test_a_rank_that_leaves_does_not_wait_for_one_that_is_gone(parts: Any, monkeypatch: pytest.MonkeyPatch):
    team, made = parts
    monkeypatch.setattr("pipeline.train.checkpoints.PATIENCE", 0.1)
    gone = threading.Event()
    held_back(made, monkeypatch, gone.wait)
    team.all(save(made, 1))
    with pytest.raises(RowFailed, match="1 ranks did not write their parts"):
        made[0].leave()
    assert not list(made[0].directory.glob("step-*"))
    gone.set()
    with pytest.raises(RowFailed, match="cannot be written"):  # the directory that it wanted to write into is gone
        made[1].leave()
    held_back(made, monkeypatch, lambda: time.sleep(0.05))
    monkeypatch.setattr("pipeline.train.checkpoints.PATIENCE", 30.0)
    team.all(save(made, 3))
    assert [made[number].leave() for number in (0, 1)] == [None, None]
    assert made[0].newest(print).step == 3
