from __future__ import annotations

import pytest
import torch

from pipeline.train.randomness import derive, generator, permutation, seed_dropout


def test_a_seed_is_a_fixed_63_bit_function_of_its_keys() -> None:
    assert derive(0) == 6197007067532723406  # blake2b-64 of "[0]" shifted right by one
    assert 0 <= derive(7, "x", 3) < 2**63


def test_every_key_counts_and_so_do_order_and_type() -> None:
    seeds = [
        derive(0, "a", 1),
        derive(0, 1, "a"),
        derive(0, "a", "1"),
        derive(0, "a", 1.0),
        derive(1, "a", 1),
        derive(0, "a1"),
    ]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError):
        derive(0, float("nan"))


def test_permutation_is_one_and_differs_by_epoch() -> None:
    first = permutation(100, 3, "shuffle", 0)
    assert sorted(first) == list(range(100))
    assert first == permutation(100, 3, "shuffle", 0) != permutation(100, 3, "shuffle", 1)


def test_generators_and_dropout_repeat() -> None:
    a, b = (torch.rand(3, generator=generator(5, "noise", 1)) for _ in range(2))
    assert torch.equal(a, b)
    draws = []
    for micro in (0, 0, 1):
        seed_dropout(5, step=2, micro=micro, rank=0)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
