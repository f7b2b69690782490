from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from pipeline.algo.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    explained_variance,
    explained_variance_sums,
    importance_weights,
)

ONE = torch.ones(1, dtype=torch.bool)


def mean(pair) -> float:
    return (pair[0] / pair[1]).item()


def test_worked_policy_clip(oracles):
    for name, want in oracles["ppo_clip eps .2"].items():
        advantage, ratio = (float(x) for x in re.findall(r"=(-?[\d.]+)", name))
        logprob = torch.tensor([math.log(ratio)], dtype=torch.float64)
        out = clipped_policy_loss(logprob, torch.zeros(1), torch.tensor([advantage]), ONE, clip=0.2)
        assert out.losses.item() == pytest.approx(want, abs=1e-12), name


def test_clipped_tokens_get_no_gradient_and_are_counted():
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    out = clipped_policy_loss(logprobs, torch.zeros(4), advantages, torch.ones(4))
    out.losses.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])
    assert mean(out.metrics["clip_fraction"]) == 0.5


def test_before_the_first_update_the_ratio_is_exactly_one():
    logprobs = torch.randn(40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.randn(40, generator=torch.Generator().manual_seed(1))
    out = clipped_policy_loss(logprobs, logprobs.detach().clone(), advantages, torch.ones(40))
    out.losses.sum().backward()
    assert mean(out.metrics["ratio"]) == 1.0
    assert mean(out.metrics["clip_fraction"]) == 0.0 and mean(out.metrics["approx_kl"]) == 0.0
    assert torch.equal(logprobs.grad, -advantages)  # the policy gradient itself


def test_approx_kl_is_that_of_the_old_policy_from_its_samples(oracles):
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    counts = torch.tensor([7, 2, 1])  # samples of the old policy p, in exact proportion
    old, new = p.log().repeat_interleave(counts), q.log().repeat_interleave(counts)
    out = clipped_policy_loss(new, old, torch.zeros(10), torch.ones(10))
    assert mean(out.metrics["approx_kl"]) == pytest.approx(oracles["kl p=[.7,.2,.1] q=[.5,.3,.2]"]["exact"])


def test_worked_value_clip(oracles):
    for name, want in oracles["value_clip .2"].items():
        value, old, target = (torch.tensor([float(x)], dtype=torch.float64) for x in re.findall(r"=([\d.]+)", name))
        out = clipped_value_loss(value, old, target, ONE, clip=0.2)
        assert out.losses.item() == pytest.approx(want, abs=1e-12), name


def test_value_loss_without_clip_and_without_movement():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    returns = torch.zeros(100)
    plain = clipped_value_loss(values, torch.zeros(100), returns, torch.ones(100), clip=None)
    assert torch.allclose(plain.losses, 0.5 * values.square())
    moved, old = (
        0.1 * values,
        0.1 - 0.2 * values.flip(0),
    )  # differences that have to be rounded, all below the clip
    moved, old = moved[(moved - old).abs() < 0.19], old[(moved - old).abs() < 0.19]
    returns = torch.zeros_like(moved)
    out = clipped_value_loss(moved, old, returns, torch.ones_like(moved))
    assert mean(out.metrics["value_clip_fraction"]) == 0.0  # rounding is not clipping
    assert torch.equal(out.losses, 0.5 * moved.square())


@pytest.mark.parametrize("poison", [1e9, -1e9, math.nan, math.inf])
def test_masked_positions_influence_nothing(poison):
    mask = torch.tensor([True, False, True])
    results = []
    for bad in (0.0, poison):
        t = lambda a, b, bad=bad: torch.tensor([a, bad, b])
        logprobs, values = t(-1.0, -2.0).requires_grad_(), t(0.5, 0.1).requires_grad_()
        policy = clipped_policy_loss(logprobs, t(-1.1, -2.5), t(1.0, -1.0), mask)
        value = clipped_value_loss(values, t(0.1, 0.1), t(1.0, 0.3), mask)
        (policy.losses.sum() + value.losses.sum()).backward()
        variance = explained_variance_sums(values, t(1.0, 0.3), mask)
        metrics = {k: (s.item(), n.item()) for k, (s, n) in {**policy.metrics, **value.metrics}.items()}
        results.append(
            (
                metrics,
                policy.losses.tolist(),
                value.losses.tolist(),
                logprobs.grad.tolist(),
                values.grad.tolist(),
                variance.tolist(),
            )
        )
    assert results[0] == results[1]
    metrics, policy_losses, value_losses, *_ = results[0]
    assert policy_losses[1] == value_losses[1] == 0.0
    assert {n for _, n in metrics.values()} == {2.0}


def test_a_batch_without_real_tokens_is_zero_and_finite():
    logprobs = torch.tensor([math.nan, 1.0], requires_grad=True)
    nothing = torch.zeros(2, dtype=torch.bool)
    out = clipped_policy_loss(logprobs, logprobs.detach(), logprobs.detach(), nothing)
    out.losses.sum().backward()
    assert out.losses.tolist() == [0.0, 0.0] and logprobs.grad.tolist() == [0.0, 0.0]


def test_entropy():
    assert entropy(torch.zeros(32000)).item() == pytest.approx(math.log(32000), rel=1e-6)
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    want = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert entropy(logits).item() == pytest.approx(want, rel=1e-6)
    assert entropy(logits.to(torch.bfloat16)).dtype == torch.float32
    poisoned = torch.cat([logits, torch.full((1, 3), math.nan)]).requires_grad_()
    got = entropy(poisoned, torch.tensor([True, False]))
    got.sum().backward()
    assert got.tolist() == pytest.approx([want, 0.0]) and torch.isfinite(poisoned.grad).all()


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    every = torch.ones(4)
    score = lambda v: explained_variance(explained_variance_sums(v, returns, every))
    assert score(returns) == pytest.approx(1.0)
    assert score(torch.full((4,), 2.5)) == pytest.approx(0.0)
    assert score(returns + 7.0) == pytest.approx(1.0)  # a constant offset is not counted against it
    assert score(-returns) == pytest.approx(-3.0)
    assert explained_variance(explained_variance_sums(returns, torch.ones(4), every)) is None
    halves = [explained_variance_sums(torch.tensor([1.0, 1.5]), returns[i : i + 2], torch.ones(2)) for i in (0, 2)]
    whole = explained_variance_sums(torch.tensor([1.0, 1.5, 1.0, 1.5]), returns, every)
    assert torch.allclose(halves[0] + halves[1], whole)


def policy_losses(ratio: list[float], advantages: list[float], **more: Any) -> list[float]:
    new = torch.tensor(ratio).log()
    mask = torch.ones(len(ratio))
    out = clipped_policy_loss(new, torch.zeros(len(ratio)), torch.tensor(advantages), mask, **more)
    return out.losses.tolist()


def test_the_upper_range_may_be_another():
    """DAPO: ratio 1.25 under A = 1 counts 1.25 up to 1.28, 1.2 up to 1.2; the lower end stays at 0.8."""
    assert policy_losses([1.25, 1.5], [1.0, 1.0], clip_high=0.28) == pytest.approx([-1.25, -1.28])
    assert policy_losses([1.25, 0.5], [1.0, -1.0]) == pytest.approx([-1.2, 0.8])
    assert policy_losses([0.5], [-1.0], clip_high=0.28) == pytest.approx([0.8])


def test_dual_clip_bounds_a_negative_advantage():
    """A = -1 at ratio 5 costs 5, and at most 3 with c = 3; a positive advantage is left alone; no gradient there."""
    assert policy_losses([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], dual_clip=3.0) == pytest.approx([3.0, 2.0, -1.2])
    new = torch.tensor([5.0, 2.0]).log().requires_grad_()
    out = clipped_policy_loss(new, torch.zeros(2), -torch.ones(2), torch.ones(2), dual_clip=3.0)
    out.losses.sum().backward()
    assert new.grad is not None and new.grad.tolist() == pytest.approx([0.0, 2.0])
    assert float(out.metrics["clip_fraction"][0]) == 1.0


def test_importance_weighs_what_the_sampler_drew_otherwise():
    """Trainer 0.5, sampler 0.25: weight 2; 0.9 over 0.1 is capped at 2; masked tokens weigh nothing."""
    ours, theirs = torch.tensor([0.5, 0.9, 0.3]).log(), torch.tensor([0.25, 0.1, 7.0]).log()
    mask = torch.tensor([1.0, 1.0, 0.0])
    weight, metrics = importance_weights(ours, theirs, mask, cap=2.0)
    assert weight.tolist() == pytest.approx([2.0, 2.0, 0.0])
    assert float(metrics["sampler_gap"][0]) == pytest.approx(math.log(2) + math.log(9), rel=1e-5)
    assert [float(x) for x in metrics["sampler_capped"]] == [1.0, 2.0]
    assert importance_weights(ours, theirs, mask, cap=None)[0].tolist() == pytest.approx([2.0, 9.0, 0.0], rel=1e-5)
    losses = clipped_policy_loss(ours, ours, torch.ones(3), mask, importance=weight).losses
    assert losses.tolist() == pytest.approx([-2.0, -2.0, 0.0])
