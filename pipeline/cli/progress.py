"""What a run shows while it works: a live line on a terminal, a plain one every few seconds elsewhere.

Everything here goes to standard error; standard output is for the run's result.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO, cast

from pipeline.flow.runner import Listener, RowResult

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 5.0
WINDOW_SECONDS = 20.0


class Pace:
    """Rate and time left over the last seconds: a row speeds up after its first steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()

    def mark(self, done: float, now: float) -> None:
        if self._marks and done < self._marks[-1][1]:
            self._marks.clear()  # another phase of the row counts from zero again
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second, None before there are two marks."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def left(self, total: float | None) -> float | None:
        """Seconds to go at this rate."""
        if not total or not self.rate:
            return None
        return max(0.0, (total - self._marks[-1][1]) / self.rate)


def clock(seconds: float) -> str:
    """
    >>> clock(65), clock(3723)
    ('1:05', '1:02:03')
    """
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figure(value: Any) -> str:
    """
    >>> figure(0.123456), figure(12345), figure(1e-7), figure(None)
    ('0.123', '12,345', '1e-07', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def amount(done: float, total: float | None, unit: str) -> str:
    """
    >>> amount(4096, 65536, "tokens")
    '4,096/65,536 tokens'
    """
    end = f"/{total:,.0f}" if total else ""
    return f"{done:,.0f}{end} {unit}"


def describe(done: float, total: float | None, unit: str, pace: Pace, figures: Mapping[str, Any]) -> str:
    parts = [amount(done, total, unit)]
    if pace.rate:
        parts.append(f"{figure(pace.rate)}/s")
    left = pace.left(total)
    if left is not None:
        parts.append(f"{clock(left)} left")
    parts += [f"{name} {figure(value)}" for name, value in list(figures.items())[:3]]
    return "  ".join(parts)


class Quiet:
    """A stream that may lose its reader (a closed pipe or terminal) without ending the run that writes to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class PlainProgress(Listener):
    """One line an event, at most one line of progress every five seconds; for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every: float = PLAIN_SECONDS) -> None:
        self._stream, self._every = Quiet(stream or sys.stderr), every
        self._pace, self._last = Pace(), 0.0

    def _line(self, row: str, text: str) -> None:
        print(f"{row}: {text}", file=self._stream, flush=True)

    def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None:
        self._pace, self._last = Pace(), time.monotonic()
        self._line(row, f"started ({why})")

    def row_reused(self, result: RowResult) -> None:
        self._line(result.row, f"reused {result.fingerprint[:12]}")

    def progress(self, row: str, done: float, total: float | None, unit: str, figures: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._pace.mark(done, now)
        if now - self._last >= self._every:
            self._last = now
            self._line(row, describe(done, total, unit, self._pace, figures))

    def said(self, row: str, text: str) -> None:
        self._line(row, text)

    def row_done(self, result: RowResult) -> None:
        self._line(result.row, f"done in {clock(result.seconds)}")

    def row_failed(self, result: RowResult, message: str) -> None:
        self._line(result.row, f"{result.status} after {clock(result.seconds)}")


class LiveProgress(Listener):
    """A bar for the row at work, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=cast(TextIO, Quiet(sys.stderr)), highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace = Pace()

    def row_started(self, row: str, stage: str, fingerprint: str, why: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._pace = Pace()
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(row, total=None, text=why)

    def progress(self, row: str, done: float, total: float | None, unit: str, figures: Mapping[str, Any]) -> None:
        self._pace.mark(done, time.monotonic())
        if self._bar is not None and self._task is not None:
            text = describe(done, total, unit, self._pace, figures)
            self._bar.update(self._task, completed=done, total=total, text=text)

    def _print(self, mark: str, style: str, row: str, text: str) -> None:
        from rich.text import Text

        console = self._bar.console if self._bar is not None else self._console
        console.print(Text.assemble((f"{mark} ", style), (row, "bold"), f"  {text}"))

    def said(self, row: str, text: str) -> None:
        self._print("·", "dim", row, text)

    def row_reused(self, result: RowResult) -> None:
        self._print("=", "cyan", result.row, f"reused {result.fingerprint[:12]}")

    def row_done(self, result: RowResult) -> None:
        self.close()
        self._print("✓", "green", result.row, f"done in {clock(result.seconds)}")

    def row_failed(self, result: RowResult, message: str) -> None:
        self.close()
        self._print("✗", "red", result.row, f"{result.status} after {clock(result.seconds)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def listener() -> PlainProgress | LiveProgress:
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()
