"""What the program says to people when it cannot go on, and the exit code that goes with it.

UserError  2   bad input or settings: the message names file:line or key, what was expected, what mends it
RowFailed  1   a row's worker failed
Damaged    3   a stored file is not what its manifest says
NonFinite  4   a loss, gradient or score is not a number
Locked     5   another process works on the same row or run directory
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from pathlib import Path


class UserError(Exception):
    """Shown without a traceback."""

    exit_code = 2


class RowFailed(UserError):
    exit_code = 1


class Damaged(UserError):
    exit_code = 3


class NonFinite(UserError):
    exit_code = 4


class Locked(UserError):
    exit_code = 5


def anew(directory: Path) -> str:
    """What mends damaged files of a row; those that are sealed are read-only, so that plain rm would ask."""
    return f"rm -rf {shlex.quote(str(directory))} and run the same command again to compute it anew"


def no_room(error: BaseException, directory: Path) -> str | None:
    """What to say of an error that means a full disk or quota; None of any other. `directory`: where, if it names none.

    Libraries in other languages report it as text alone.
    """
    number = getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT) and os.strerror(errno.ENOSPC) not in str(error):
        return None
    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else directory
    there = next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(there).free // 10**6
    return (
        f"{path.absolute()}: no space left on the disk, {free} MB are free: make room and run the same command again; "
        "what is sealed and the last checkpoint are as they were"
    )


def no_memory(error: BaseException) -> bool:
    """Whether an error means that there was not enough memory; PyTorch's on a CPU is a RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
