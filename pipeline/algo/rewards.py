"""From raw scores to the one number an answer is trained on: ensembles, statistics, length terms.

Legend: M reward models, N answers. What ends an answer (`finish_scores`) and whitening live in `advantages.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from pipeline.algo.advantages import finish_scores, whiten

Combination = Literal["mean", "worst", "uncertainty"]


def combine(scores_MN: Tensor, how: Combination, k: float = 1.0) -> Tensor:
    """One score for each answer [N] of an ensemble's [M, N] (Coste et al. 2023, "Reward model ensembles help mitigate
    overoptimization").

    mean         their mean
    worst        their minimum (worst-case optimisation)
    uncertainty  mean - k * standard deviation over the M models, divided by M. The paper takes k times the variance
                 off; a standard deviation has the score's own unit, so that k keeps its meaning when scores are scaled
    """
    if how == "worst":
        return scores_MN.amin(dim=0)
    mean = scores_MN.mean(dim=0)
    return mean if how == "mean" else mean - k * scores_MN.std(dim=0, correction=0)


def soft_overlong(lengths_N: Tensor, budget: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """What is added to the scores of long answers, in [-penalty, 0] (DAPO, Yu et al. 2025, eq. 13).

    Nothing up to `budget - buffer` tokens, from there linearly down to -penalty at `budget`, which stays.
    """
    into = (lengths_N.double() - (budget - buffer)) / buffer
    return -penalty * into.clamp(0.0, 1.0)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of everything seen so far, merged batch by batch (Chan, Golub and LeVeque 1983).

    Plain floats: JSON keeps them to the last bit.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, totals: Tensor) -> RunningMoments:
        """With what `moments` of a batch gives, summed over micro-batches and ranks."""
        total, square, count = (float(x) for x in totals)
        if count == 0:
            return self
        mean = total / count
        n, apart = self.count + count, mean - self.mean
        squares = max(square - total * mean, 0.0)
        return RunningMoments(
            n, self.mean + apart * count / n, self.squares + squares + apart * apart * self.count * count / n
        )

    @property
    def std(self) -> float:
        """The biased one (divided by n), 0 before anything was seen."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalise(self, x: Tensor, epsilon: float = 1e-8) -> Tensor:
        """(x - mean) / sqrt(variance + epsilon)."""
        return (x - self.mean) / math.sqrt(self.std**2 + epsilon)

    def state(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> RunningMoments:
        """Raises ValueError where `state` is not what `state()` gave."""
        names = {f.name for f in fields(cls)}
        if set(state) != names:
            raise ValueError(f"running statistics hold {sorted(names)}, found {sorted(state)}")
        return cls(**{name: float(state[name]) for name in names})


def shape_scores(
    scores_N: Tensor,
    lengths_N: Tensor,
    stopped_N: Tensor,
    *,
    clip: float | None = None,
    token_penalty: float = 0.0,
    overlong: tuple[int, int, float] | None = None,
    unfinished_score: float | None = None,
    unfinished_penalty: float = 0.0,
) -> Tensor:
    """Normalised scores [N] to what answers are trained on. Lengths in tokens, the stop token included.

    1. clipped to [-clip, clip], so that no outlier of a learned score outweighs the terms below
    2. less `token_penalty` for each token, and `soft_overlong` of (budget, buffer, penalty)
    3. an answer that did not stop gets exactly `unfinished_score`, or loses `unfinished_penalty` (`finish_scores`)
    """
    scores = scores_N if clip is None else scores_N.clamp(-clip, clip)
    if token_penalty:
        scores = scores - token_penalty * lengths_N
    if overlong is not None:
        scores = scores + soft_overlong(lengths_N, *overlong)
    return finish_scores(scores, stopped_N, score=unfinished_score, penalty=unfinished_penalty)


def whitened(scores_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`whiten` over all of the scores."""
    return whiten(scores_N, torch.ones_like(scores_N, dtype=torch.bool), shift_mean=shift_mean)
