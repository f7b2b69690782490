"""Rates, times left, and lines that do not flood a log."""

from __future__ import annotations

import io

import pytest

from pipeline.cli import progress
from pipeline.cli.progress import LiveProgress, Pace, PlainProgress, clock, describe, figure
from pipeline.flow.runner import Listener, RowResult


def test_rate_and_time_left() -> None:
    pace = Pace()
    pace.mark(0, 100.0)
    assert pace.rate is None and pace.left(1000) is None
    pace.mark(200, 110.0)
    assert pace.rate == 20.0 and pace.left(1000) == 40.0
    assert pace.left(None) is None


def test_the_rate_forgets_a_slow_start() -> None:
    pace = Pace()
    for now, done in ((0, 0), (60, 10), (70, 1010), (80, 2010)):
        pace.mark(done, float(now))
    assert pace.rate == 100.0


def test_another_phase_counts_from_zero() -> None:
    pace = Pace()
    for now, done in ((0, 0), (10, 100), (20, 5), (30, 15)):
        pace.mark(done, float(now))
    assert pace.rate == 1.0


def test_a_line_of_progress() -> None:
    pace = Pace()
    pace.mark(0, 0.0)
    pace.mark(4096, 2.0)
    line = describe(4096, 65536, "tokens", pace, {"loss": 2.3456, "kl": None, "lr": 1e-4, "more": 1})
    assert line == "4,096/65,536 tokens  2,048/s  0:30 left  loss 2.35  kl -  lr 0.0001"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.5, "0.5"), (1234.5, "1,234"), (7, "7"), ("a", "a"), (True, "True")]
)
def test_figures(value: object, text: str) -> None:
    assert figure(value) == text
    assert clock(59.6) == "1:00"


def test_plain_lines_come_at_most_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    listener = PlainProgress(stream)
    listener.row_started("sft", "sft", "f" * 64, "never run")
    for _ in range(100):
        now[0] += 0.25
        listener.progress("sft", now[0] * 10, 1000, "tokens", {"loss": 1.0})
    listener.row_done(RowResult("sft", "sft", "executed", seconds=25.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft: started (never run)" and lines[-1] == "sft: done in 0:25"
    assert len(lines) == 2 + 5
    assert lines[1].startswith("sft: 50/1,000 tokens  10/s  1:35 left")


class Gone(io.StringIO):
    """A pipe without a reader."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise OSError


def every_event(listener: Listener) -> None:
    listener.row_started("sft", "sft", "f" * 64, "never run")
    listener.progress("sft", 1, 10, "tokens", {"loss": 1.0})
    listener.said("sft", "words")
    listener.row_done(RowResult("sft", "sft", "executed"))
    listener.row_reused(RowResult("sft", "sft", "reused"))
    listener.row_failed(RowResult("sft", "sft", "failed"), "no")
    listener.close()


def test_progress_falls_silent_where_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    every_event(PlainProgress(Gone(), every=0.0))
    monkeypatch.setattr("sys.stderr", Gone())
    every_event(LiveProgress())


def test_the_live_line_survives_any_order_of_events() -> None:
    listener = LiveProgress()
    listener.progress("sft", 1, None, "tokens", {})
    listener.row_started("sft", "sft", "f" * 64, "never [run]")
    listener.progress("sft", 1, 10, "tokens", {"loss": 1.0})
    listener.said("sft", "a [bracket] is text")
    listener.row_failed(RowResult("sft", "sft", "failed"), "no")
    listener.row_reused(RowResult("sft", "sft", "reused"))
    listener.close()
