"""Comparisons between policies on the same prompts, with intervals that resample prompts.

Answers to one prompt are not independent evidence, so everything is first averaged within each prompt, and
the bootstrap draws prompts. Two policies are always compared on the same prompts, draw by draw.

Legend: P prompts, N and M samples of a prompt, C columns, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS = 4000
LEVEL = 0.95
TIE = 1e-9  # scores closer than this are equal: sums of parts differ by rounding


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its interval (95 % unless said)."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def prompt_means(prompts: Sequence[str], values: ArrayLike) -> tuple[list[str], Floats]:
    """Values of single answers averaged by prompt: ids in order of first sight, means [P]."""
    order = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    index = np.array([order[p] for p in prompts], dtype=np.int64)
    flat = _finite(values, "values")
    if flat.shape != index.shape:
        raise ValueError(f"{flat.size} values for {index.size} prompt ids")
    total = np.bincount(index, weights=flat, minlength=len(order))
    return list(order), total / np.bincount(index, minlength=len(order))


def wins(a: ArrayLike, b: ArrayLike) -> Floats:
    """How often an answer of `a` beats one of `b`, by prompt [P]; a tie counts half.

    a [P] or [P, N], b [P] or [P, M]; all N x M pairs of answers of a prompt are compared.
    """
    ours, theirs = _by_prompt(a), _by_prompt(b)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} prompts against {len(theirs)}: both sides must answer the same prompts")
    gap = ours[:, :, None] - theirs[:, None, :]
    return ((gap > TIE) + 0.5 * (np.abs(gap) <= TIE)).mean((1, 2))


def bootstrap(columns: ArrayLike, *, seed: int, draws: int = DRAWS, level: float = LEVEL) -> list[Interval]:
    """Percentile intervals for the mean of each column of [P, C]; all columns see the same draws."""
    table = _finite(columns, "values")
    means = np.concatenate([w @ table for w in _weights(len(table), draws, seed)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    rows = zip(table.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [_interval(m, lo, hi) for m, lo, hi in rows]


def bootstrap_mean(values: ArrayLike, *, seed: int, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """The mean over prompts of [P] or [P, N] with its interval."""
    return bootstrap(_by_prompt(values).mean(1)[:, None], seed=seed, draws=draws, level=level)[0]


def win_rate(a: ArrayLike, b: ArrayLike, *, seed: int) -> Interval:
    """Share of wins of `a` over `b`, ties split: 0.5 is no difference."""
    return bootstrap_mean(wins(a, b), seed=seed)


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int) -> Interval:
    """Mean of `a` minus mean of `b` over the same prompts, each [P] or [P, N]."""
    ours, theirs = _by_prompt(a).mean(1), _by_prompt(b).mean(1)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} prompts against {len(theirs)}: both sides must answer the same prompts")
    return bootstrap_mean(ours - theirs, seed=seed)


def win_rates_by_part(a: Mapping[str, ArrayLike], b: Mapping[str, ArrayLike], *, seed: int) -> dict[str, Interval]:
    """Win rate of `a` over `b` on each part of a judge that both have, each part [P] or [P, N]."""
    parts = [p for p in a if p in b]
    if not parts:
        return {}
    table = np.stack([wins(a[p], b[p]) for p in parts], axis=1)
    return dict(zip(parts, bootstrap(table, seed=seed), strict=True))


def share_of_gap(policy: ArrayLike, start: ArrayLike, top: ArrayLike, *, seed: int) -> Interval | None:
    """How much of the way from `start` to `top` the policy has gone: (policy - start) / (top - start).

    A ratio of means over prompts. None where `top` is not clearly above `start`.
    """
    gone = _by_prompt(policy).mean(1) - _by_prompt(start).mean(1)
    way = _by_prompt(top).mean(1) - _by_prompt(start).mean(1)
    return ratio_of_means(gone, way, seed=seed)


def ratio_of_means(above: ArrayLike, below: ArrayLike, *, seed: int) -> Interval | None:
    """mean(above) / mean(below) over prompts [P], with its interval.

    None where mean(below) is not clearly positive (its interval reaches 0): the ratio has no bounds.
    """
    table = np.stack([_finite(above, "values"), _finite(below, "values")], axis=1)
    top, bottom = table.mean(0)
    drawn = np.concatenate([w @ table for w in _weights(len(table), DRAWS, seed)])
    edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    if min(bottom, np.quantile(drawn[:, 1], edges[0])) <= TIE:
        return None
    drawn = drawn[drawn[:, 1] > TIE]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], edges)
    return _interval(float(top / bottom), float(low), float(high))


def compare_policies(
    scores: Mapping[str, ArrayLike],
    *,
    reference: str,
    parts: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    seed: int,
) -> dict[str, dict[str, object]]:
    """Every policy against the reference and against every other, as the evaluation row records it.

    scores  policy -> [P] or [P, N], of one judge, on the same prompts
    parts   policy -> part of the judge -> [P] or [P, N]

    Returns policy -> {"win_rate": {"vs", "mean", "low", "high"} or None for the reference itself,
                       "win_rate_parts": {part: {"mean", "low", "high"}}, where parts are given,
                       "against": {other: {"win_rate": {...}, "difference": {...}}}}
    """
    if reference not in scores:
        raise ValueError(f"the reference {reference!r} is not among the policies: {', '.join(scores)}")
    pairs = [(a, b) for a in scores for b in scores if a != b]
    against: dict[str, dict[str, dict[str, dict[str, float]]]] = {name: {} for name in scores}
    if pairs:
        means = {name: _by_prompt(s).mean(1) for name, s in scores.items()}
        columns = [wins(scores[a], scores[b]) for a, b in pairs] + [means[a] - means[b] for a, b in pairs]
        intervals = [i.to_json() for i in bootstrap(np.stack(columns, axis=1), seed=seed)]
        halves = zip(pairs, intervals[: len(pairs)], intervals[len(pairs) :], strict=True)
        for (a, b), won, difference in halves:
            against[a][b] = {"win_rate": won, "difference": difference}
    result: dict[str, dict[str, object]] = {}
    for name in scores:
        own = None if name == reference else {"vs": reference, **against[name][reference]["win_rate"]}
        result[name] = {"win_rate": own, "against": against[name]}
        if parts is not None:
            by_part = win_rates_by_part(parts[name], parts[reference], seed=seed) if own else {}
            result[name]["win_rate_parts"] = {p: i.to_json() for p, i in by_part.items()}
    return result


def _weights(prompts: int, draws: int, seed: int) -> Iterator[Floats]:
    """Blocks of [d, P]: how often each prompt is drawn, over P. A block bounds the memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // prompts)
    for at in range(0, draws, block):
        d = min(block, draws - at)
        drawn = rng.integers(0, prompts, (d, prompts)) + prompts * np.arange(d)[:, None]
        yield np.bincount(drawn.ravel(), minlength=d * prompts).reshape(d, prompts) / prompts


def _by_prompt(values: ArrayLike) -> Floats:
    table = _finite(values, "scores")
    return table[:, None] if table.ndim == 1 else table


def _finite(values: ArrayLike, what: str) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.size == 0:
        raise ValueError(f"no {what} to compare")
    if not np.isfinite(table).all():
        raise ValueError(f"{what} hold a number that is not finite")
    return table


def _interval(mean: float, low: float, high: float) -> Interval:
    # Rounding, or a skewed handful of prompts, may put a quantile on the wrong side of the mean.
    return Interval(mean, min(low, mean), max(high, mean))
