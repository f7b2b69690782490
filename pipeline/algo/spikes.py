"""Whether a step's loss is a spike: a pure function of the losses before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def is_spike(loss: float, before: Sequence[float], *, sigmas: float, window: int) -> bool:
    """More than `sigmas` standard deviations above the mean of the last `window` losses.

    The rule of OLMo-core's SkipStepOptimizer (OLMo 2, 2025), for the loss alone: the gradient norm is not known before
    the update under every strategy. False before half a window is known. The losses of skipped steps belong to
    `before`, so that a loss which stays high is soon no spike any more.
    """
    recent = before[-window:]
    if len(recent) < max(2, window // 2):
        return False
    return loss > statistics.fmean(recent) + sigmas * statistics.stdev(recent)
