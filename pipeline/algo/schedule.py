"""Learning-rate multipliers as pure functions of the optimiser step: no state, no ranks."""

from __future__ import annotations

import math

SHAPES = ("cosine", "linear", "constant", "wsd")


def multiplier(
    step: int, *, total: int, warmup: int = 0, shape: str = "cosine", final: float = 0.0, cooldown: int = 0
) -> float:
    """What the peak learning rate is multiplied by at `step`.

    Linear from 0 at step 0 to 1 at step `warmup`; then, with x = (step - warmup) / (total - warmup),
        cosine    final + (1 - final) (1 + cos(pi x)) / 2                              Loshchilov & Hutter 2017
        linear    final + (1 - final) (1 - x)
        constant  1
        wsd       1 up to step total - cooldown, then final^((step - total + cooldown) / cooldown)    Hu et al. 2024
    and the last value from `total` on. ValueError for an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    if step < warmup:
        return step / warmup
    if shape == "constant":
        return 1.0
    if shape == "wsd":
        fallen = min(step, total) - (total - cooldown)
        return float(final ** (fallen / cooldown)) if fallen > 0 else 1.0
    x = min((step - warmup) / max(total - warmup, 1), 1.0)
    fall = (1.0 + math.cos(math.pi * x)) / 2.0 if shape == "cosine" else 1.0 - x
    return final + (1.0 - final) * fall
