from __future__ import annotations

import math
import re

import pytest
import torch

from pipeline.algo.reward import centring_penalty, pairwise_loss, ranking_loss, ranking_pairs


def test_worked_losses(oracles):
    cases = {k: v for k, v in oracles.items() if k.startswith("bt -logsig(rc-rr-m) ")}
    assert len(cases) == 5
    for name, want in cases.items():
        chosen, rejected, margin = (float(x) for x in re.findall(r"=(-?[\d.]+)", name))
        got = pairwise_loss(torch.tensor(chosen), torch.tensor(rejected), margin)
        assert got.item() == pytest.approx(want, rel=1e-6), name


def test_worked_probability_and_gradient(oracles):
    chosen = torch.tensor(1.0, requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor(0.0))
    loss.backward()
    assert math.exp(-loss.item()) == pytest.approx(oracles["bt accuracy prob(delta=1)"], rel=1e-6)
    assert chosen.grad.item() == pytest.approx(oracles["bt grad wrt (rc) at delta=1 = -(1-sig(1))"], rel=1e-6)


def test_a_difference_of_minus_1000_does_not_overflow():
    chosen = torch.tensor(-1000.0, requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor(0.0))
    loss.backward()
    assert loss.item() == 1000.0 and chosen.grad.item() == -1.0


def test_centring_is_zero_only_where_scores_cancel():
    got = centring_penalty(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0]))
    assert got.tolist() == [0.0, 9.0]


def test_all_pairs_of_two_rankings():
    worth = torch.tensor([3.0, 1.0, 1.0, 0.0, 5.0, 7.0])  # a group of four with a tie, a group of two
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    pairs = ranking_pairs(worth, group)
    got = list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True))
    assert got == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (5, 4)]
    assert pairs.ties == 1
    assert pairs.weight_P.tolist() == [1.0] * 6


def test_weights_by_prompt_are_one_over_k_choose_2():
    worth = torch.tensor([3.0, 1.0, 1.0, 0.0, 5.0, 7.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    weights = ranking_pairs(worth, group, weight_by="prompt").weight_P
    assert weights.tolist() == pytest.approx([1 / 6] * 5 + [1.0])
    with pytest.raises(ValueError, match="weight_by"):
        ranking_pairs(worth, group, weight_by="group")


def test_nothing_to_compare_gives_no_pairs_and_a_zero_loss():
    pairs = ranking_pairs(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 0, 1]), weight_by="prompt")
    scores = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    out = ranking_loss(scores, pairs)
    out.losses.sum().backward()
    assert pairs.ties == 1 and out.losses.shape == (0,) and scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_ranking_loss_is_the_weighted_sum_of_its_pairs():
    scores = torch.tensor([2.0, -1.0, 0.5])
    pairs = ranking_pairs(torch.tensor([2.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64), weight_by="prompt")
    out = ranking_loss(scores, pairs)
    softplus = lambda x: math.log1p(math.exp(-x))
    assert out.losses.sum().item() == pytest.approx((softplus(3.0) + softplus(1.5) + softplus(1.5)) / 3)
    assert out.metrics["accuracy"][0].item() == 3.0 and out.metrics["accuracy"][1].item() == 3.0
    assert out.metrics["loss"][0].item() == pytest.approx(softplus(3.0) + 2 * softplus(1.5))


def test_permuting_the_completions_permutes_the_loss():
    generator = torch.Generator().manual_seed(0)
    scores, worth = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    group = torch.arange(12) // 4
    order = torch.randperm(12, generator=generator)
    one = ranking_loss(scores, ranking_pairs(worth, group)).losses.sort().values
    other = ranking_loss(scores[order], ranking_pairs(worth[order], group[order])).losses.sort().values
    assert torch.equal(one, other)
