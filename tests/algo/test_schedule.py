from __future__ import annotations

import pytest

from pipeline.algo.schedule import multiplier


def test_worked_cosine(oracles):
    for step, want in oracles["cosine warm 10 total 110 base 1e-3"].items():
        assert 1e-3 * multiplier(int(step), total=110, warmup=10) == pytest.approx(want, abs=1e-15), step


def test_ends_at_a_share_of_the_peak():
    assert multiplier(110, total=110, warmup=10, final=0.1) == pytest.approx(0.1)
    assert multiplier(500, total=110, warmup=10, final=0.1) == pytest.approx(0.1)
    assert multiplier(60, total=110, warmup=10, final=0.1) == pytest.approx(0.55)


def test_linear_and_constant():
    assert [multiplier(s, total=4, shape="linear") for s in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [multiplier(s, total=4, warmup=2, shape="constant") for s in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def test_warm_up_stable_decay():
    """10 steps, 2 of warm-up, 4 of cooldown to a sixteenth: each of them halves the rate."""
    rates = [multiplier(s, total=10, warmup=2, shape="wsd", final=1 / 16, cooldown=4) for s in range(12)]
    assert rates == [0.0, 0.5, 1, 1, 1, 1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625]


def test_corners():
    assert multiplier(0, total=0) == 1.0
    assert multiplier(5, total=5, warmup=5) == 1.0
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        multiplier(0, total=1, shape="sine")
