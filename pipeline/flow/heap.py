"""The heap of a worker on a CPU. Where there is no glibc nothing happens.

    keep_freed()           freed blocks stay the process's: with glibc's defaults a training step of an 8M model takes
                           350,000 page faults and 0.9 s of system time
    give_back()            what is free goes back to the kernel: between phases that hold different things
    heap = Heap()
    heap.mark()            now most is in use
    heap.tidy()            gives back where the process holds far more than that

PyTorch asks for blocks at multiples of 64 bytes, and glibc before 2.38 finds no room for such a block where one of the
same size was freed: a step of an adapter over int8 weights held 870 MB free beside 390 MB in use (mallinfo2).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # of mallinfo2
SHARE, LEAST = 0.5, 256 << 20  # of what is in use, bytes: what may be free without being given back


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def _libc(*needed: str) -> Any:
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in needed) else None


def keep_freed() -> None:
    if libc := _libc("mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    if libc := _libc("malloc_trim"):
        libc.malloc_trim(0)


class Heap:
    """What this process holds, against what is in use of it."""

    def __init__(self) -> None:
        self._libc = _libc("mallinfo2", "malloc_trim")
        self.most = self.others = 0
        if self._libc:
            self._libc.mallinfo2.restype = _Info
            self._give_back()

    def mark(self) -> None:
        self.most = self._used()

    def tidy(self) -> bool:
        """Whether anything was given back."""
        if not self._libc or _resident() - self.others - self.most <= max(LEAST, SHARE * self.most):
            return False
        self._give_back()
        return True

    def _give_back(self) -> None:
        """What stays beyond what is in use now is not the heap's: code, libraries, mapped files."""
        give_back()
        self.most = self._used()
        self.others = _resident() - self.most

    def _used(self) -> int:
        if not self._libc:
            return 0
        found = self._libc.mallinfo2()
        return int(found.uordblks + found.hblkhd)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
