"""Runs of n words as 64-bit numbers: what duplicates and overlaps are found by.

A word is what white space delimits, in lower case and without punctuation (Brown et al. 2020, appendix C). Text that
puts no spaces between words is one long word, and overlaps in it are not found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_CHUNK, _NO_LETTER = re.compile(r"\S+"), re.compile(r"[\W_]+")
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def words(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The words of a text, and from which character to which each stands in it."""
    found = [(_NO_LETTER.sub("", chunk.group().lower()), chunk.span()) for chunk in _CHUNK.finditer(text)]
    return [word for word, _ in found if word], [span for word, span in found if word]


def grams(text_words: Sequence[str], n: int) -> Hashes:
    """One number for every run of `n` words, in order; empty where there are fewer."""
    if len(text_words) < n:
        return np.empty(0, np.uint64)
    each = np.array([_hash(word) for word in text_words], np.uint64)
    runs = len(each) - n + 1
    total = np.zeros(runs, np.uint64)
    for i in range(n):  # unsigned sums and products wrap around
        total = total * _STEP + each[i : i + runs]
    return mixed(total)


def mixed(values: Any) -> Hashes:
    """Every bit of the result depends on every bit of the value: the finaliser of splitmix64 (Steele et al. 2014)."""
    z = np.asarray(values, np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=1_000_000)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
