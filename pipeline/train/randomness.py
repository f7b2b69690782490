"""Randomness is derived, never carried: every draw is a function of the seed and of what it is for.

    derive(seed, "shuffle", epoch)          an integer of 63 bits
    permutation(n, seed, "epoch", epoch)    the order in which an epoch is read
    generator(seed, "noise", prompt)        a torch generator
    seed_dropout(seed, step, micro, rank)   the global generator that dropout draws from

So a resumed run, another number of ranks or another way to cut a batch see the same shuffles and the same
noise; dropout alone depends on how the work was cut.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Key = str | int | float | bool | None | tuple["Key", ...]


def derive(seed: int, *keys: Key) -> int:
    """A 63-bit integer from blake2b of the canonical JSON of `[seed, *keys]`.

    Text and numbers differ (1 is not "1", and neither is 1.0), and the order of the keys counts.
    """
    canonical = json.dumps([seed, *keys], separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *keys: Key) -> torch.Generator:
    """A CPU generator seeded with `derive(seed, *keys)`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *keys))


def permutation(n: int, seed: int, *keys: Key) -> list[int]:
    """The numbers 0 … n-1 in an order that depends on seed and keys alone."""
    import torch

    return torch.randperm(n, generator=generator(seed, *keys)).tolist()


def seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the global generators, which dropout draws from, for one forward and backward pass."""
    import torch

    torch.manual_seed(derive(seed, "dropout", step, micro, rank))
