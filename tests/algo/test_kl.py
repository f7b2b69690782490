from __future__ import annotations

import math

import pytest
import torch

from pipeline.algo.kl import ESTIMATORS, AdaptiveKL, BandKL, FixedKL, controller, exact_kl, k1, k2, k3

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ALL = torch.ones(3, dtype=torch.bool)


@pytest.fixture
def numbers(oracles):
    return oracles["kl p=[.7,.2,.1] q=[.5,.3,.2]"]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_estimators_by_enumeration(numbers, name):
    got = ESTIMATORS[name](P.log(), Q.log(), ALL)
    mean = (P * got).sum()
    assert got.tolist() == pytest.approx(numbers[name], abs=1e-12)
    assert mean.item() == pytest.approx(numbers[f"E_{name}"], abs=1e-12)
    assert (P * (got - mean).square()).sum().item() == pytest.approx(numbers[f"var_{name}"], abs=1e-12)


def test_exact_kl_in_both_directions(numbers):
    assert exact_kl(P.log(), Q.log()).item() == pytest.approx(numbers["exact"], abs=1e-12)
    assert exact_kl(Q.log(), P.log()).item() == pytest.approx(numbers["reverse"], abs=1e-12)
    shifted = exact_kl(P.log() + 5.0, Q.log() - 3.0)  # logits, not log-probs
    assert shifted.item() == pytest.approx(numbers["exact"], abs=1e-12)


def test_gradients_by_enumeration(oracles):
    """Inside a loss k1 has no gradient, k2 the right one, k3 that of KL(q || p)."""
    want = oracles["kl gradients wrt logits"]

    def gradient(f):
        logits = P.log().clone().requires_grad_()
        f(logits).backward()
        return logits.grad.tolist()

    def expected(estimator):  # the samples' distribution is not differentiated
        return lambda z: (P * estimator(torch.log_softmax(z, -1), Q.log(), ALL)).sum()

    assert gradient(lambda z: exact_kl(z, Q.log())) == pytest.approx(want["exact"], abs=1e-12)
    assert gradient(expected(k1)) == pytest.approx(want["E_grad_k1"], abs=1e-12)
    assert gradient(expected(k2)) == pytest.approx(want["E_grad_k2"], abs=1e-12)
    assert gradient(expected(k3)) == pytest.approx(want["E_grad_k3"], abs=1e-12)
    reverse = gradient(lambda z: exact_kl(Q.log(), z))
    assert reverse == pytest.approx(want["grad_reverse_KL_q_p"], abs=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_equal_policies_give_exactly_zero(name):
    logprobs = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert ESTIMATORS[name](logprobs, logprobs.clone(), torch.ones(50)).tolist() == [0.0] * 50
    assert exact_kl(logprobs, logprobs.clone()).item() == 0.0


@pytest.mark.parametrize("poison", [1e9, -1e9, math.nan, math.inf])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_masked_positions_influence_nothing(name, poison):
    mask = torch.tensor([True, False, True])
    results = []
    for bad in (0.0, poison):
        logprobs = torch.tensor([-1.0, bad, -2.0], requires_grad=True)
        got = ESTIMATORS[name](logprobs, torch.tensor([-1.5, bad, -1.0]), mask)
        got.sum().backward()
        results.append((got.tolist(), logprobs.grad.tolist()))
    assert results[0] == results[1] and results[0][0][1] == 0.0


def test_masked_rows_of_logits_influence_nothing():
    mask = torch.tensor([True, False])
    logits = torch.stack([P.log(), torch.full((3,), math.nan, dtype=torch.float64)]).requires_grad_()
    got = exact_kl(logits, torch.stack([Q.log(), Q.log()]), mask)
    got.sum().backward()
    assert got[1].item() == 0.0 and got[0].item() == pytest.approx(0.0851228259572216)
    assert torch.isfinite(logits.grad).all()


def test_bfloat16_logits_are_widened_before_the_softmax():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(20, 500, generator=generator).to(torch.bfloat16)
    b = (a.float() + 0.1 * torch.randn(20, 500, generator=generator)).to(torch.bfloat16)
    assert exact_kl(a, b).dtype == torch.float32
    assert torch.allclose(exact_kl(a, b).double(), exact_kl(a.double(), b.double()), atol=1e-5)


def test_adaptive_controller(oracles):
    start = AdaptiveKL(coefficient=0.15, target=6.0, horizon=10_000.0)
    for kl, want in oracles["klctl init .15 target 6 n 512 horizon 10000"].items():
        assert start.update(float(kl), 512).coefficient == pytest.approx(want, abs=1e-15), kl
    now = start
    for kl in (12.0, 12.0, 6.0, 0.0):
        now = now.update(kl, 512)
    assert now.coefficient == pytest.approx(oracles["klctl after 12,12,6,0"], abs=1e-15)
    assert start.coefficient == 0.15  # a state is never changed in place


def test_controllers_travel_as_json():
    fixed, adaptive = FixedKL(0.1), AdaptiveKL(0.2, target=3.0, horizon=100.0)
    assert fixed.update(100.0, 512) == fixed
    assert controller(fixed.state()) == fixed and controller(adaptive.state()) == adaptive
    with pytest.raises(ValueError, match="'fixed', 'adaptive' or 'band'"):
        controller({"kind": "pid", "coefficient": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKL(0.1, target=0.0)


def test_the_band_moves_only_outside():
    band = BandKL(0.1, low=4.0, high=9.0)
    assert [band.update(kl, 64).coefficient for kl in (3.9, 4.0, 9.0, 9.1)] == pytest.approx([0.05, 0.1, 0.1, 0.2])
    assert controller(band.update(10.0, 1).state()) == BandKL(0.2, 4.0, 9.0)
    with pytest.raises(ValueError, match="low < high"):
        BandKL(0.1, low=5.0, high=5.0)
