"""Sampling noise that is a pure function of what is being sampled.

A sampled token takes its uniform number from (seed, row, iteration, prompt, sample, position) alone, so a
prompt's samples depend neither on the other prompts of a batch nor on its size, and a resumed run needs no
generator state.

    key = NoiseKey(seed=0, row="ppo", iteration=3)
    streams_PK = streams(key, ["p17", "p18"], samples=4)     # uint64, one stream a sample
    uniforms(streams_PK, 0, 48)                               # float32 [2, 4, 48], in [0, 1)

The generator is splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014): output number n of the stream s is mix(s + n * GAMMA), which can be computed for any n directly.

Shapes: P prompts, K samples a prompt, N positions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd
_MASK = (1 << 64) - 1

Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What all samples of one call of an engine share."""

    seed: int
    row: str
    iteration: int = 0


def mix(words: Words) -> Words:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every input bit reaches every output
    bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def word(part: int | str) -> int:
    """A 64-bit word for one part of a key; 1 and "1" are different parts."""
    if isinstance(part, int):
        return part & _MASK
    return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")


def fold(*parts: int | str) -> int:
    """One 64-bit word from an ordered key."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state + np.array([(GAMMA + word(part)) & _MASK], np.uint64))
    return int(state[0])


def content_names(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Names of prompts that carry none: their ids, and for equal prompts which one of them it is."""
    seen: Counter[str] = Counter()
    names = []
    for ids in prompts:
        digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).hexdigest()
        names.append(f"{digest}/{seen[digest]}")
        seen[digest] += 1
    return names


def streams(key: NoiseKey, names: Sequence[int | str], samples: int) -> Words:
    """One stream for each sample of each named prompt, uint64 [P, K]."""
    base = fold(key.seed, key.row, key.iteration)
    prompts_P = np.array([(base + GAMMA + word(name)) & _MASK for name in names], np.uint64)
    samples_K = np.arange(samples, dtype=np.uint64) + np.uint64(GAMMA)
    return mix(mix(prompts_P)[:, None] + samples_K[None, :])


def uniforms(streams_: Words, start: int, count: int) -> NDArray[np.float32]:
    """Numbers in [0, 1) of positions start .. start + count - 1: float32 [..., count], multiples of
    2**-24."""
    positions_N = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(GAMMA)
    words = mix(streams_[..., None] + positions_N)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
