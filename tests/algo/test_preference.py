from __future__ import annotations

import math

import pytest
import torch

from pipeline.algo.preference import LOSSES, PairLogps, Sigmoid, make_loss


def worked(pc=-12.0, pr=-15.0, rc=-13.0, rr=-14.0) -> PairLogps:
    t = lambda x: torch.tensor([x], dtype=torch.float32)
    return PairLogps(t(pc).requires_grad_(), t(pr).requires_grad_(), t(rc), t(rr), t(9), t(4))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_worked_numbers(oracles, beta):
    want = oracles[f"dpo beta={beta} pc-12 pr-15 rc-13 rr-14"]
    logps = worked()
    out = Sigmoid(beta=beta)(logps)
    out.losses.sum().backward()
    assert out.losses.item() == pytest.approx(want["loss"], rel=1e-6)
    assert logps.policy_chosen.grad.item() == pytest.approx(want["dloss_dpc"], rel=1e-6)
    assert logps.policy_rejected.grad.item() == pytest.approx(-want["dloss_dpc"], rel=1e-6)
    for metric, key in [
        ("reward_chosen", "chosen_reward"),
        ("reward_rejected", "rejected_reward"),
        ("margin", "margin"),
    ]:
        total, count = out.metrics[metric]
        assert (total / count).item() == pytest.approx(want[key], rel=1e-6)
    smooth = Sigmoid(beta=beta, label_smoothing=0.1)(worked())
    assert smooth.losses.item() == pytest.approx(want["cdpo_eps01"], rel=1e-6)


@pytest.mark.parametrize("e", [0.0, 0.1, 0.3])
def test_is_ln_2_where_policy_is_reference(oracles, e):
    out = Sigmoid(beta=0.3, label_smoothing=e)(worked(-13.0, -14.0, -13.0, -14.0))
    assert oracles["dpo step0 policy==ref"] == pytest.approx(math.log(2))
    assert out.losses.item() == pytest.approx(math.log(2), abs=1e-7)
    assert out.metrics["margin"][0].item() == 0.0
    assert out.metrics["accuracy"][0].item() == 0.5  # nothing is preferred yet


def test_sums_not_means_over_tokens():
    """Lengths are known to the loss and do not enter this one."""
    t = lambda x: torch.tensor([x])
    short = PairLogps(t(-2.0), t(-6.0), t(-3.0), t(-5.0), t(2.0), t(6.0))
    long = PairLogps(t(-2.0), t(-6.0), t(-3.0), t(-5.0), t(20.0), t(60.0))
    assert Sigmoid()(short).losses.item() == Sigmoid()(long).losses.item()
    assert Sigmoid(beta=1.0)(short).losses.item() == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-6)


def test_stays_finite_and_gives_the_reference_no_gradient():
    reference = torch.tensor([0.0], requires_grad=True)
    policy = torch.tensor([-1e6], requires_grad=True)
    out = Sigmoid(beta=1.0)(PairLogps(policy, torch.tensor([0.0]), reference, torch.tensor([0.0]), policy, policy))
    out.losses.sum().backward()
    assert out.losses.item() == 1e6 and policy.grad.item() == -1.0
    assert reference.grad is None


def test_bfloat16_log_probs_are_widened():
    t = lambda x: torch.tensor([x], dtype=torch.bfloat16)
    assert Sigmoid()(PairLogps(t(-1.0), t(-2.0), t(-1.0), t(-2.0), t(1), t(1))).losses.dtype == torch.float32


def test_registry():
    assert LOSSES["sigmoid"] is Sigmoid and Sigmoid.needs_reference
    assert make_loss("sigmoid", beta=0.2) == Sigmoid(beta=0.2)
    with pytest.raises(ValueError, match="there are: .*sigmoid"):
        make_loss("sigmoyd")
    with pytest.raises(ValueError, match="has no gamma; it has: beta"):
        make_loss("sigmoid", gamma=1.0)


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_hyperparameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sigmoid(**bad)


def test_a_missing_reference_is_refused():
    t = torch.zeros(1)
    with pytest.raises(ValueError, match="no reference"):
        Sigmoid()(PairLogps(t, t, None, None, t, t))
