"""The rule by which a loss is a spike, on losses whose deviation can be computed by hand."""

from __future__ import annotations

from pipeline.algo.spikes import is_spike

CALM = [1.0, 3.0, 1.0, 3.0]  # mean 2, sample deviation sqrt(4 / 3) = 1.1547


def test_a_spike_stands_out_by_so_many_deviations():
    assert not is_spike(4.3, CALM, sigmas=2, window=4)  # 2 + 2 * 1.1547 = 4.3094
    assert is_spike(4.31, CALM, sigmas=2, window=4)
    assert not is_spike(-100.0, CALM, sigmas=2, window=4)


def test_only_the_last_losses_count_and_half_a_window_must_be_known():
    assert is_spike(4.31, [99.0, *CALM], sigmas=2, window=4)
    assert not is_spike(4.31, [99.0, *CALM], sigmas=2, window=5)
    assert not is_spike(1e9, CALM, sigmas=2, window=10)
    assert is_spike(1e9, CALM, sigmas=2, window=9)
    assert not is_spike(1e9, [1.0], sigmas=2, window=4)


def test_equal_losses_have_no_deviation():
    assert not is_spike(1.0, [1.0] * 4, sigmas=6, window=4) and is_spike(1.1, [1.0] * 4, sigmas=6, window=4)
