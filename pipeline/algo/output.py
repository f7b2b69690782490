"""What a loss returns, and the masking that every function of this package shares.

A metric is a pair (sum, count), never a mean: pairs are added over micro-batches, steps and ranks, and
divided once at the end, so a figure does not depend on how a batch was cut up.

Masked positions hold anything (padding, poison, NaN). They are overwritten with a harmless value before any
arithmetic, so that neither values nor gradients can leak; multiplying by the mask afterwards would not do,
because NaN * 0 is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]  # (sum, count), float64 scalars without gradient


@dataclass(frozen=True)
class LossOutput:
    """`losses` keeps the shape of its items (pairs, tokens), 0 where masked; reduce by a sum, divide once."""

    losses: Tensor
    metrics: dict[str, Sums] = field(default_factory=dict)


def keep(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`x` where `mask`, else `fill`, in at least float32. Gradients at masked positions are exactly 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask.bool(), x, torch.full_like(x, fill))


def sums(x: Tensor, mask: Tensor | None = None) -> Sums:
    """(sum, count) of the unmasked items of `x`."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    kept = keep(x.detach(), mask)
    return kept.sum(dtype=torch.float64), mask.bool().sum().to(torch.float64)


def agreement(margins: Tensor) -> Sums:
    """How often a margin is positive, an exact 0 counting half: a scorer that knows nothing gets 0.5."""
    m = margins.detach()
    return sums((m > 0).to(torch.float32) + 0.5 * (m == 0).to(torch.float32))
