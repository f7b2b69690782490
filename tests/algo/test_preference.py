"""Preference losses against numbers that can be checked by hand.

pc = -12, pr = -15 (policy), rc = -13, rr = -14 (reference): log ratios 1 and -1, h = 2, answers of 3 and 5 tokens
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algo.preference import (
    LOSSES,
    Kto,
    Llama3,
    PairLogps,
    PairLoss,
    Sigmoid,
    UnpairedLogps,
    make_loss,
    reference_point,
)

PAIRED = [name for name, loss in LOSSES.items() if loss.paired]
LN2 = math.log(2)


def row(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float32)


def worked(pc=-12.0, pr=-15.0, rc: float | None = -13.0, rr: float | None = -14.0, lc=3.0, lr=5.0) -> PairLogps:
    reference = [None if r is None else row(r) for r in (rc, rr)]
    return PairLogps(row(pc).requires_grad_(), row(pr).requires_grad_(), *reference, row(lc), row(lr), row(-pc / lc))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def mean(metric: tuple[Tensor, Tensor]) -> float:
    return (metric[0] / metric[1]).item()


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
        assert mean(out.metrics[metric]) == pytest.approx(want[key], rel=1e-6)
    for name, more, key in [
        ("sigmoid", {"label_smoothing": 0.1}, "cdpo_eps01"),
        ("ipo", {}, "ipo_sum"),
        ("hinge", {}, "hinge"),
    ]:
        assert make_loss(name, beta=beta, **more)(worked()).losses.item() == pytest.approx(want[key], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.5981388694),
        ("sigmoid", {"beta": 0.5}, 0.3132616875),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.6181388694),
        # (0.9 * 0.5981388694 - 0.1 * 0.7981388694) / 0.8
        ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.5731388694),
        ("robust", {"beta": 0.1, "label_smoothing": 0.0}, 0.5981388694),
        ("ipo", {"beta": 0.1}, 9.0),  # (2 - 5)^2
        ("ipo", {"beta": 0.5}, 1.0),  # (2 - 1)^2
        ("ipo", {"beta": 0.1, "length_normalised": True}, (1 / 3 + 1 / 5 - 5) ** 2),
        ("hinge", {"beta": 0.1}, 0.8),
        ("hinge", {"beta": 0.5}, 0.0),
        ("sigmoid_norm", {"beta": 3.0}, softplus(-3 * (1 / 3 + 1 / 5))),
        ("apo_zero", {"beta": 0.1}, 0.9500416250),  # 1 - s(0.1) + s(-0.1) = 2 * 0.4750208125
        ("llama3", {"beta": 0.1, "sft_coefficient": 0.0}, 0.5981388694),
        ("llama3", {"beta": 0.1}, 0.5981388694 + 0.2 * 12 / 3),
        ("sigmoid", {"beta": 0.1, "sft_coefficient": 0.5}, 0.5981388694 + 0.5 * 12 / 3),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, softplus(2 * 4 - 2 * 3 + 1)),  # m = -4 and -3: margin -3
        # m = -4, -3: odds 0.0183156389 / 0.9816843611 = 0.0186573604, 0.0497870684 / 0.9502129316 = 0.0523956987
        ("orpo", {"beta": 0.1}, 4 - 0.1 * math.log(0.0186573604 / (0.0186573604 + 0.0523956987))),
        ("orpo", {"beta": 1.0, "sft_coefficient": 0.0}, -math.log(0.0186573604 / (0.0186573604 + 0.0523956987))),
    ],
)
def test_each_loss_by_hand(name: str, given: dict[str, Any], expected: float):
    """T26: the first eleven do not depend on lengths 3 and 5, the normalised ones do."""
    assert make_loss(name, **given)(worked()).losses.item() == pytest.approx(expected, rel=2e-7, abs=1e-7)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ipo", "hinge", "apo_zero"])
def test_sums_not_means_over_tokens(name: str):
    """T26: lengths are known to these and do not enter them."""
    assert make_loss(name)(worked()).losses.item() == make_loss(name)(worked(lc=30, lr=7)).losses.item()


@pytest.mark.parametrize("name", ["sigmoid_norm", "simpo", "orpo"])
def test_means_over_tokens(name: str):
    """Twice the log-probs over twice the tokens are the same answer to these."""
    twice = worked(-24, -30, -26, -28, 6, 10)
    assert make_loss(name)(worked()).losses.item() == pytest.approx(make_loss(name)(twice).losses.item(), rel=1e-6)
    assert make_loss(name)(worked()).losses.item() != pytest.approx(make_loss(name)(worked(lc=4)).losses.item())


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_are_those_of_the_differences(name: str):
    """Against central differences in float64, through every part of the loss."""
    loss, ends = make_loss(name), [-12.0, -15.0]
    step = 1e-2

    def at(pc: float, pr: float) -> float:
        return loss(worked(pc, pr)).losses.item()

    logps = worked(*ends)
    total = loss(logps).losses
    nll = -logps.policy_chosen / 3  # the term that PairLogps brings along
    (total + loss.sft_coefficient * (nll - nll.detach())).sum().backward()
    numeric = [
        (at(-12 + step, -15) - at(-12 - step, -15)) / 2 / step,
        (at(-12, -15 + step) - at(-12, -15 - step)) / 2 / step,
    ]
    found = [logps.policy_chosen.grad.item(), logps.policy_rejected.grad.item()]
    assert found == pytest.approx(numeric, abs=2e-4, rel=2e-3)
    assert found[0] < 0 < found[1]  # chosen up, rejected down


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.3, 5.0])
@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("sigmoid", {}, lambda b: LN2),
        ("sigmoid", {"label_smoothing": 0.3}, lambda b: LN2),
        ("robust", {"label_smoothing": 0.3}, lambda b: LN2),
        ("ipo", {}, lambda b: 1 / (4 * b * b)),
        ("ipo", {"length_normalised": True}, lambda b: 1 / (4 * b * b)),
        ("hinge", {}, lambda b: 1.0),
        ("sigmoid_norm", {}, lambda b: LN2),
        ("apo_zero", {}, lambda b: 1.0),
        ("llama3", {}, lambda b: LN2),
    ],
)
def test_the_loss_at_the_start(name, given, expected, beta: float):
    """Policy and reference equal: 25 for IPO with beta 0.1; the NLL term is told apart."""
    loss = make_loss(name, beta=beta, **given)
    out = loss(worked(-13.0, -14.0))
    assert loss.start({}) == pytest.approx(expected(beta), rel=1e-12)
    assert mean(out.metrics["loss"]) == pytest.approx(expected(beta), rel=2e-7)
    assert out.metrics["margin"][0].item() == 0.0
    assert out.metrics["accuracy"][0].item() == 0.5  # nothing is preferred yet


def test_ln_2_is_the_published_start(oracles):
    assert oracles["dpo step0 policy==ref"] == pytest.approx(LN2)


def test_losses_without_a_reference_have_no_known_start():
    assert [n for n in LOSSES if not LOSSES[n].needs_reference] == ["simpo", "orpo"]
    for name in ("simpo", "orpo"):
        loss = make_loss(name)
        assert loss.start({}) is None
        assert loss(worked(rc=None, rr=None)).losses.item() == loss(worked()).losses.item()


def test_the_nll_term_is_told_apart():
    out = Llama3()(worked())
    assert {k: mean(v) for k, v in out.metrics.items() if k in ("loss", "preference_loss", "sft_nll")} == pytest.approx(
        {"loss": 0.5981388694, "preference_loss": 0.5981388694, "sft_nll": 4.0}
    )
    assert "sft_nll" not in Sigmoid()(worked()).metrics
    bare = PairLogps(*(row(-1.0) for _ in range(4)), row(1), row(1))
    with pytest.raises(ValueError, match="holds no nll_chosen"):
        Llama3()(bare)


def test_robust_is_unbiased_under_flips():
    """With a share e of labels flipped, its mean is DPO's on the true labels: 0.9 L(c, r) + 0.1 L(r, c) = DPO."""
    loss = make_loss("robust", beta=0.5, label_smoothing=0.1)
    flipped = worked(-15.0, -12.0, -14.0, -13.0)
    found = 0.9 * loss(worked()).losses.item() + 0.1 * loss(flipped).losses.item()
    assert found == pytest.approx(Sigmoid(beta=0.5)(worked()).losses.item(), rel=1e-6)


def test_odds_stay_finite_where_an_answer_is_certain():
    logps = worked(0.0, -500.0, lc=3, lr=5)
    out = make_loss("orpo")(logps)
    out.losses.sum().backward()
    assert torch.isfinite(out.losses).all() and torch.isfinite(logps.policy_chosen.grad).all()
    empty = make_loss("orpo")(worked(0.0, -3.0, lc=1, lr=0))
    assert torch.isfinite(empty.losses).all()


def test_stays_finite_and_gives_the_reference_no_gradient():
    reference = torch.tensor([0.0], requires_grad=True)
    policy = torch.tensor([-1e6], requires_grad=True)
    out = Sigmoid(beta=1.0)(PairLogps(policy, torch.tensor([0.0]), reference, torch.tensor([0.0]), policy, policy))
    out.losses.sum().backward()
    assert out.losses.item() == 1e6 and policy.grad.item() == -1.0
    assert reference.grad is None


def test_bfloat16_log_probs_are_widened():
    t = lambda x: torch.tensor([x], dtype=torch.bfloat16)
    for name in PAIRED:
        assert (
            make_loss(name)(PairLogps(t(-1.0), t(-2.0), t(-1.0), t(-2.0), t(1), t(1), t(1.0))).losses.dtype
            == torch.float32
        )


# KTO


def ratings(*ratios: float, desirable: list[bool], point: float = 0.0) -> UnpairedLogps:
    """Answers of those log ratios over a reference of -10."""
    policy = torch.tensor(ratios) - 10.0
    return UnpairedLogps(policy.requires_grad_(), torch.full((len(ratios),), -10.0), torch.tensor(desirable), point)


def test_kto_by_hand():
    """beta 0.5, z0 = 1: ratios 3 (liked) and -1 (disliked) stand 2 nats right of it, 1 - s(1) = 0.2689414214."""
    out = Kto(beta=0.5)(ratios := ratings(3.0, -1.0, desirable=[True, False], point=1.0))
    assert out.losses.tolist() == pytest.approx([0.2689414214, 0.2689414214], rel=1e-6)
    out.losses.sum().backward()  # -+ beta s(1) (1 - s(1)) = 0.5 * 0.1966119332
    assert ratios.policy.grad.tolist() == pytest.approx([-0.0983059666, 0.0983059666], rel=1e-5)
    figures = {name: mean(metric) for name, metric in out.metrics.items()}
    assert figures == pytest.approx(
        {"loss": 0.2689414214, "reward_desirable": 1.5, "reward_undesirable": -0.5, "accuracy": 1.0, "desirable": 0.5,
         "logp_desirable": -7.0, "logp_undesirable": -11.0}
    )  # fmt: skip
    wrong = Kto(beta=0.5)(ratings(-1.0, 3.0, 1.0, desirable=[True, False, True], point=1.0))
    assert wrong.losses.tolist() == pytest.approx([0.7310585786, 0.7310585786, 0.5], rel=1e-6)
    assert mean(wrong.metrics["accuracy"]) == pytest.approx(0.5 / 3)


def test_kto_weighs_the_two_ratings():
    out = Kto(desirable_weight=3.0, undesirable_weight=0.5)(ratings(0, 0, 0, desirable=[True, False, False]))
    assert out.losses.tolist() == [1.5, 0.25, 0.25]
    assert Kto(desirable_weight=3.0, undesirable_weight=0.5).start({"desirable": 1 / 3}) == pytest.approx(2.0 / 3)
    assert Kto().start({"desirable": 0.9}) == pytest.approx(0.5)
    assert Kto(undesirable_weight=0.5).balance(10, 40) == 0.5 and Kto().balance(3, 0) == math.inf


def test_the_reference_point_is_never_below_zero_and_hides_no_nan():
    assert [reference_point(x) for x in (-0.5, 0.0, 0.25)] == [0.0, 0.0, 0.25]
    assert math.isnan(reference_point(math.nan))


# The union


def test_registry():
    assert LOSSES["sigmoid"] is Sigmoid and Sigmoid.needs_reference
    assert set(LOSSES) == {
        "sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "apo_zero", "llama3", "simpo", "orpo", "kto"
    }  # fmt: skip
    assert make_loss("sigmoid", beta=0.2) == Sigmoid(beta=0.2)
    with pytest.raises(ValueError, match="there are: .*sigmoid"):
        make_loss("sigmoyd")
    with pytest.raises(ValueError, match="has no gamma; it has: beta, label_smoothing, sft_coefficient"):
        make_loss("sigmoid", gamma=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_hyperparameter_has_a_sentence_and_every_loss_a_source(name: str):
    for f in fields(LOSSES[name]):
        assert f.metadata["help"].endswith(".") and f.default is not None
    assert "20" in (LOSSES[name].__doc__ or "").partition("\n")[0]  # the year of the paper
    assert issubclass(LOSSES[name], PairLoss) == LOSSES[name].paired


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("sigmoid", {"beta": 0.0}),
        ("sigmoid", {"beta": -1.0}),
        ("ipo", {"beta": math.nan}),
        ("sigmoid", {"label_smoothing": 0.5}),
        ("robust", {"label_smoothing": -0.1}),
        ("simpo", {"gamma": -0.1}),
        ("orpo", {"sft_coefficient": -0.1}),
        ("kto", {"undesirable_weight": 0.0}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, bad: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_loss(name, **bad)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="no reference"):
        Sigmoid()(worked(rc=None, rr=None))


def test_planning_reads_the_losses_without_torch():
    code = "import sys, pipeline.algo.preference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
