"""Metrics as sums over sums: a mean is kept as (sum, count) until the very end, over micro-batches and ranks.

A mean of means depends on how a batch was cut and shared out; a sum of sums over a sum of counts does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Number = float | int | Tensor
Gather = Callable[[dict[str, tuple[float, float]]], Iterable[Mapping[str, tuple[float, float]]]]


class Sums:
    """Running (sum, count) pairs by name.

    >>> sums = Sums()
    >>> sums.add({"loss": (4.0, 2), "accuracy": (1.0, 2)})
    >>> sums.add({"loss": (8.0, 8)})
    >>> sums.means()
    {'loss': 1.2, 'accuracy': 0.5}
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Number, Number]]] = {}

    def add(self, pairs: Mapping[str, tuple[Number, Number]]) -> None:
        """Tensors must be scalars; they are detached here and read only by `totals`, so that no device
        waits.
        """
        for name, (total, count) in pairs.items():
            self._parts.setdefault(name, []).append((_detached(total), _detached(count)))

    def totals(self) -> dict[str, tuple[float, float]]:
        """Exact sums (float64, correctly rounded) of what was added in this process."""
        return {
            name: (exact_sum(float(t) for t, _ in parts), exact_sum(float(c) for _, c in parts))
            for name, parts in self._parts.items()
        }

    def means(self, gather: Gather | None = None) -> dict[str, float]:
        """sum / count by name, over all ranks when `gather` is given; a name without any count is left
        out.
        """
        totals = merge(gather(self.totals())) if gather else self.totals()
        return {name: total / count for name, (total, count) in totals.items() if count}


def merge(ranks: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Totals of all ranks from those of each; a rank may lack names that others have."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for totals in ranks:
        for name, pair in totals.items():
            parts.setdefault(name, []).append(pair)
    return {name: (exact_sum(t for t, _ in p), exact_sum(c for _, c in p)) for name, p in parts.items()}


def exact_sum(values: Iterable[float]) -> float:
    """The correctly rounded sum, in any order; inf or NaN where math.fsum would raise."""
    listed = list(values)
    return math.fsum(listed) if all(map(math.isfinite, listed)) else sum(listed)


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, torch.Tensor) else value
