"""SIGINT and SIGTERM in a worker: at once, or after the step at hand where a row can be gone on with.

    stopping.install()                      once a process
    with stopping.after_steps():            inside, a signal is only noted
        ...
        if number := stopping.asked():      between two steps: save, then
            raise stopping.Interrupted(number)

The runner makes the second signal a SIGKILL, so a step that takes long can always be left.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_noted: int | None = None
_inside = False


class Interrupted(BaseException):
    """SIGINT or SIGTERM reached the worker; not an Exception, so that no stage swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def install() -> None:
    for number in SIGNALS:
        signal.signal(number, _handle)


def asked() -> int | None:
    """The signal that came inside `after_steps`, or None."""
    return _noted


@contextmanager
def after_steps() -> Iterator[None]:
    """Signals are noted until the end of the block; one that nobody acted on ends the process there."""
    global _inside, _noted
    _inside, _noted = True, None
    try:
        yield
    finally:
        _inside, left, _noted = False, _noted, None
    if left is not None:
        raise Interrupted(left)


def _handle(number: int, _frame: object) -> None:
    global _noted
    if not _inside:
        raise Interrupted(number)
    _noted = number
