"""A training row that was stopped, at any step and in any way, ends on the same bits as one that was not."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.flow import stopping
from pipeline.flow.errors import Damaged, UserError
from pipeline.train import resume
from pipeline.train.batches import Plan
from pipeline.train.loop import Outcome, Trainer, fit
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build
from tests.train.tiny import Listener, Tiny, next_token, records

RANKS = build(device="cpu")
STEPS = 6
SCORES = [3.0, 1.0, 2.0]  # of the three evaluations: the second is the best


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the row's code runs after it."""


class Eyes:
    """A watch that remembers how often it looked."""

    chosen_by = "heldout"

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> dict[str, float]:
        self.looks += 1
        return {"choice": -math.inf if self.looks == 1 else float(self.looks % 3), "kl": 0.5}

    def chosen(self, kept_step: int, *, chose: bool, looked: int) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"looks": self.looks}

    def load(self, state: Any) -> None:
        self.looks = state["looks"]


def row(
    root: Path,
    killed_in: int | None = None,
    watch: Eyes | None = None,
    at: Any = None,
    width: int = 16,
    **settings: Any,
) -> Any:
    """One try of a row with dropout; returns its outcome, weights and lines. `killed_in`: the step that never ends."""
    settings = {"batch": 2, "evaluations": 3, "learning_rate": 0.05, "checkpoint_every": 2, **settings}
    train = TrainSettings(**settings)
    plan = Plan(records(2 * STEPS), train, seed=0, strategy=RANKS)
    made = Trainer(Tiny(width, dropout=0.2), next_token, train, RANKS, total=len(plan), seed=0)
    step = made.step

    def stepping(*arguments: Any, **named: Any) -> dict[str, float]:
        if made.done + 1 == killed_in:
            raise Killed
        found = step(*arguments, **named)
        if at:
            at(made.done)
        return found

    made.step = stepping  # type: ignore[method-assign]
    listener = Listener(root)
    listener.lines = _LINES.setdefault(str(root), [])
    score = lambda: {"loss": SCORES[[2, 4, 6].index(made.done)]}
    outcome = fit(made, plan, listener, evaluate=None if watch else score, watch=watch)
    lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in listener.lines]
    return outcome, {k: v.clone() for k, v in made.module.state_dict().items()}, lines, listener.said


_LINES: dict[str, list[dict[str, Any]]] = {}  # what a metrics file keeps from try to try


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0] and found[2] == expected[2]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


@pytest.mark.parametrize("killed_in", [1, 2, 3, 4, 5, 6])
def test_killed_in_any_step_it_goes_on_to_the_same_bits(tmp_path: Path, killed_in: int) -> None:
    whole = row(tmp_path / "whole")
    assert isinstance(whole[0], Outcome) and whole[0].kept_step == 4  # the best weights are not the last
    with pytest.raises(Killed):
        row(tmp_path / "parts", killed_in)
    found = row(tmp_path / "parts")
    assert_same(found, whole)
    begun = (killed_in - 1) // 2 * 2
    said = [text for text in found[3] if "goes on" in text]
    assert said == ([f"goes on after step {begun}, from its checkpoint"] if begun else [])


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_every_optimiser_goes_on_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    wide = {"optimizer": optimizer, "width": 256}  # wide enough for 8 bits
    whole = row(tmp_path / "whole", **wide)
    with pytest.raises(Killed):
        row(tmp_path / "parts", 4, **wide)
    found = row(tmp_path / "parts", **wide)
    assert_same(found, whole)
    assert any("goes on after step 2" in text for text in found[3])


def test_killed_in_every_step_one_after_another(tmp_path: Path) -> None:
    whole = row(tmp_path / "whole", checkpoint_every=1)
    for killed_in in range(1, STEPS + 1):
        with pytest.raises(Killed):
            row(tmp_path / "parts", killed_in, checkpoint_every=1)
    assert_same(row(tmp_path / "parts", checkpoint_every=1), whole)
    assert_same(row(tmp_path / "parts", checkpoint_every=1), whole)  # stopped after the last step, before the seal


def test_what_a_watch_saw_is_remembered(tmp_path: Path) -> None:
    """Its first look is beyond the budget: minus infinity is kept too."""
    whole = row(tmp_path / "whole", watch=Eyes())
    with pytest.raises(Killed):
        row(tmp_path / "parts", 5, watch=Eyes())
    found = row(tmp_path / "parts", watch=Eyes())
    assert_same(found, whole)
    assert whole[0].kept_step == 4 and whole[0].looks[0]["choice"] == -math.inf


@pytest.mark.parametrize("killed_in", [2, 4, 5, 6])
def test_spikes_are_told_by_the_losses_before_the_break(tmp_path: Path, killed_in: int) -> None:
    """Two steps known are enough, and hardly any deviation is: some of the six steps are skipped."""
    rule = {"skip_spikes": 0.1, "spike_window": 4, "checkpoint_every": 1}
    whole = row(tmp_path / "whole", **rule)
    assert 0 < whole[0].skipped == sum(line["skipped"] for line in whole[2]) < 4
    assert [s for s in whole[3] if "is a spike" in s]
    with pytest.raises(Killed):
        row(tmp_path / "parts", killed_in, **rule)
    assert_same(row(tmp_path / "parts", **rule), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in stopping.SIGNALS}
    stopping.install()
    try:
        with pytest.raises(stopping.Interrupted) as left:
            row(tmp_path / "parts", at=lambda done: done == 3 and os.kill(os.getpid(), number))
        assert left.value.exit_code == 128 + number
        assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()].count("step-000003") == 1
        found = row(tmp_path / "parts")
        assert "goes on after step 3, from its checkpoint" in found[3]
        assert_same(found, row(tmp_path / "whole"))
        with pytest.raises(stopping.Interrupted):  # without checkpoints there is nothing to wait for
            row(tmp_path / "none", checkpoint_every=0, at=lambda _: os.kill(os.getpid(), number))
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_without_checkpoints_it_starts_anew_and_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        row(tmp_path, 4)
    assert list((tmp_path / "checkpoints").glob("step-*"))
    again = row(tmp_path, checkpoint_every=0)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert [line["step"] for line in again[2]] == [1, 2, 3, 4, 5, 6]


def test_no_room_for_two_checkpoints_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "free_megabytes", lambda _: 7)
    monkeypatch.setattr(resume, "megabytes", lambda _: 1)
    with pytest.raises(UserError, match="two checkpoints need 8 MB and 7 MB are free: make room"):
        row(tmp_path, killed_in=1)  # weights, two moments, the best weights, twice
    monkeypatch.setattr(resume, "free_megabytes", lambda _: 8)
    row(tmp_path)


@pytest.mark.parametrize("key", ["updates", "best", "metrics_size", "own", "tokens", "last", "evaluations", "spikes"])
def test_a_state_that_lacks_something_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with pytest.raises(Killed):
        row(tmp_path, 3)
    newest = resume.Checkpoints.newest

    def without(self: Any, say: Any) -> Any:
        found = newest(self, say)
        (found.state if key in found.state else found.state["own"]).pop(key)  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(resume.Checkpoints, "newest", without)
    with pytest.raises(Damaged, match=f"holds no '{key}'"):
        row(tmp_path)
