"""Locks that name their holder and that a dead holder does not keep.

    hold(path, what)      context manager; Locked names pid, host and start of the process that has it
    run_lock(run_dir)     the right to write into a run directory
    is_held(path)         whether a live process has it

The kernel's flock decides; the file's text only says who. A holder that was killed leaves its text behind,
which the next one finds in `Lock.recovered`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Locked, UserError


@dataclass
class Lock:
    """A held lock. `recovered` is what a dead holder left: {pid, host, started}, or None."""

    path: Path
    recovered: dict[str, Any] | None = None


@contextmanager
def run_lock(run_dir: Path) -> Iterator[Lock]:
    """The right to write into a run directory. Locked where another process has it."""
    with hold(Path(run_dir) / "run.lock", f"the run {Path(run_dir).name}") as lock:
        yield lock


@contextmanager
def hold(path: Path, what: str) -> Iterator[Lock]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a pipe would be waited for
            raise UserError(f"{path}: is not a regular file; remove it")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(f"{what} is in use by {_holder_words(_holder(path))}; wait for it or stop it") from error
        lock = Lock(path, _holder(path))
        _tell(fd, {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()})
        try:
            yield lock
        finally:
            _tell(fd, None)
            fcntl.flock(fd, fcntl.LOCK_UN)  # also where a forked child still has the descriptor
    finally:
        os.close(fd)


def _tell(fd: int, holder: dict[str, Any] | None) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(holder).encode() if holder else b"", 0)


def _holder(path: Path) -> dict[str, Any] | None:
    """Who wrote itself into a lock file; None where it was let go in good order."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "null")
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"pid", "host", "started"} else None


def _holder_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    gone = holder["host"] == socket.gethostname() and not Path(f"/proc/{holder['pid']}").exists()
    left = " (gone; a worker that it started still runs)" if gone and Path("/proc/self").exists() else ""
    return f"process {holder['pid']}{left} on {holder['host']}, started {holder['started']}"


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
