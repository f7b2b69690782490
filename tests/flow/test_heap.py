"""What a process gives back, measured in one of its own, because the heap's settings are the process's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.flow import heap

MEASURE = """
import ctypes, json
from pipeline.flow import heap
heap.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
MB = 1 << 20

def made(count):
    blocks = [libc.malloc(MB) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, MB)
    return blocks

watched, found = heap.Heap(), []
for in_use, freed in ((0, 200), (0, 300), (800, 300), (800, 500)):
    blocks, more = made(in_use), made(freed)
    last = made(1)  # above them, so that none of them is at the top of the heap
    watched.mark()
    watched.most -= freed * MB
    for block in more:
        libc.free(block)
    before = heap._resident()
    told = watched.tidy()
    found.append((told, round((before - heap._resident()) / MB)))
    heap.give_back()
    for block in (*blocks, *last):
        libc.free(block)
    heap.give_back()
print(json.dumps(found))
"""


@pytest.mark.skipif(heap._libc("mallinfo2") is None, reason="glibc's heap alone can be asked")
def test_it_gives_back_what_is_more_than_256_mb_and_half_of_what_is_in_use() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (few, none), (many, gone), (half, nothing), (more, went) = json.loads(done.stdout)
    assert (few, none, half, nothing) == (False, 0, False, 0)
    assert many and gone == pytest.approx(300, abs=5)
    assert more and went == pytest.approx(500, abs=5)


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_libc", lambda *needed: None)
    heap.keep_freed()
    heap.give_back()
    watched = heap.Heap()
    watched.mark()
    assert not watched.tidy() and watched.most == 0
