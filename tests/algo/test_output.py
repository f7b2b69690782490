from __future__ import annotations

import math

import torch

from pipeline.algo.output import agreement, keep, sums


def test_keep_overwrites_and_widens():
    x = torch.tensor([1.0, math.nan], dtype=torch.bfloat16, requires_grad=True)
    got = keep(x, torch.tensor([1, 0]))
    got.sum().backward()
    assert got.tolist() == [1.0, 0.0] and got.dtype == torch.float32
    assert x.grad.tolist() == [1.0, 0.0]
    assert keep(torch.tensor([2.0], dtype=torch.float64), torch.tensor([True])).dtype == torch.float64


def test_sums_of_sums_is_not_the_mean_of_means(oracles):
    """Two tokens at loss 2.0 and eight at 1.0 are 1.2 a token, however they were cut."""
    want = oracles["loss normalisation micro A: 2 tok @2.0, B: 8 tok @1.0"]
    a, b = sums(torch.full((2,), 2.0)), sums(torch.full((8,), 1.0))
    assert ((a[0] + b[0]) / (a[1] + b[1])).item() == want["token_mean"]
    assert ((a[0] / a[1] + b[0] / b[1]) / 2).item() == want["mean_of_micro_means"]


def test_agreement_counts_a_tie_half():
    total, count = agreement(torch.tensor([1.0, -1.0, 0.0, 2.0]))
    assert total.item() == 2.5 and count.item() == 4.0
