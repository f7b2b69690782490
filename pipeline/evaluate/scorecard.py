"""What a reward model is worth: accuracy on pairs, and what choosing by it recovers.

    accuracy against the labels            how well it fits labellers it has not seen
    accuracy against gold on clear pairs   how well it sees through their mistakes, beside the labellers' own
    accuracy on correctness alone          whether it tells right from wrong, or only style
    a length-only baseline                 what never reading the answer would reach
    best of n                              how much of the gain of choosing by gold choosing by it brings

Legend: P pairs or prompts, N samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.evaluate.compare import TIE, bootstrap, ratio_of_means

Floats = NDArray[np.float64]
Scores = Floats | Sequence[ArrayLike]  # by prompt, of its answers
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """A share of `count` cases with its 95 % Wilson interval."""

    mean: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def wilson(successes: float, count: int, z: float = Z95) -> Proportion | None:
    """Wilson's score interval (1927); `successes` may hold halves for ties. None without cases."""
    if count == 0:
        return None
    p = successes / count
    scale = 1.0 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Proportion(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), count)


def accuracy(margins: ArrayLike) -> Proportion | None:
    """Share of positive margins, an exact tie counting half."""
    m = np.asarray(margins, dtype=np.float64)
    if not np.isfinite(m).all():
        raise ValueError("margins hold a number that is not finite")
    return wilson(float((m > TIE).sum() + 0.5 * (np.abs(m) <= TIE).sum()), m.size)


@dataclass(frozen=True)
class ScoredPairs:
    """Held-out pairs as labelled (chosen, rejected), each side [P].

    reward   the model under test
    length   tokens or characters, for the baseline
    gold     the judge's score, where there is a judge
    parts    the judge's named parts, where there is a judge
    """

    reward_chosen: Floats
    reward_rejected: Floats
    length_chosen: Floats
    length_rejected: Floats
    gold_chosen: Floats | None = None
    gold_rejected: Floats | None = None
    parts_chosen: Mapping[str, Floats] = field(default_factory=dict)
    parts_rejected: Mapping[str, Floats] = field(default_factory=dict)


def scorecard(pairs: ScoredPairs, *, correctness_part: str = "correct") -> dict[str, Any]:
    """The scorecard as evaluation records it; accuracies are {"mean", "low", "high", "count"} or None.

    labels              against the labels
    length              the better of "the longer is chosen" and "the shorter is chosen", with its `direction`
    clear_gap           one standard deviation of the judge's score over all answers: what makes a pair clear
    clear               on clear pairs, against the true order
    clear_labellers     the labellers' own accuracy on the same pairs
    correctness         on pairs whose judged parts differ in correctness alone, against the true order
    The last four are None without a judge.
    """
    reward = _column(pairs.reward_chosen) - _column(pairs.reward_rejected)
    length = _column(pairs.length_chosen) - _column(pairs.length_rejected)
    card: dict[str, Any] = {
        "labels": _json(accuracy(reward)),
        "length": _length_baseline(length),
        "margin": float(reward.mean()) if reward.size else None,
        **dict.fromkeys(("clear_gap", "clear", "clear_labellers", "correctness")),
    }
    if pairs.gold_chosen is None or pairs.gold_rejected is None:
        return card
    chosen, rejected = _column(pairs.gold_chosen), _column(pairs.gold_rejected)
    gold = chosen - rejected
    gap = float(np.concatenate([chosen, rejected]).std())
    clear = np.abs(gold) >= max(gap, TIE)
    alone = differ_only_in(pairs.parts_chosen, pairs.parts_rejected, correctness_part)
    card["clear_gap"] = gap
    card["clear"] = _json(accuracy((reward * np.sign(gold))[clear]))
    card["clear_labellers"] = _json(accuracy(gold[clear]))
    if alone is not None:
        card["correctness"] = _json(accuracy((reward * alone)[alone != 0]))
    return card


def differ_only_in(a: Mapping[str, Floats], b: Mapping[str, Floats], part: str) -> Floats | None:
    """By pair [P]: +1 where `a` is better in that part and equal in all others, -1 where `b` is, else 0.

    None where the part is not judged.
    """
    if part not in a or part not in b:
        return None
    sign = np.sign(_column(a[part]) - _column(b[part]))
    for other in a:
        if other != part:
            sign = np.where(np.abs(_column(a[other]) - _column(b[other])) <= TIE, sign, 0.0)
    return sign


def best_of_n(reward: Scores, gold: Scores | None, *, seed: int, one_sampler: bool = True) -> list[dict[str, Any]]:
    """What the best of n answers is worth on average, for every n up to N, from one set of answers.

    reward, gold   by prompt the scores of its answers, [P, N]; where prompts have more or fewer answers, N is the
                   fewest, and the others' more are used too. Gold may be missing.
    one_sampler    whether all answers to a prompt are draws of one policy at one temperature: else no bound

    For each n the expectation over all subsets of n of a prompt's answers is computed exactly: an unbiased
    estimator with far less noise than taking the first n. Among equal rewards the lowest index is chosen.

    Returns one dict by n:
        n
        reward                  mean reward of the answer chosen by it {"mean", "low", "high"}
        by_reward, by_gold      mean gold score of the answer chosen by either, None without gold
        recovered               (by_reward - by chance) / (by_gold - by chance), None where gold gains nothing
        kl_bound                log n - (n - 1) / n: no sampler of this kind is further from the policy, nats
    """
    rewards = _by_prompt(reward)
    golds = _by_prompt(gold) if gold is not None else None
    if golds is not None and [r.shape for r in rewards] != [g.shape for g in golds]:
        raise ValueError(f"reward and gold must be of the same answers, not {_shape(rewards)} and {_shape(golds)}")
    most = min(len(r) for r in rewards)
    tables = [_expected(rewards, rewards, most)]
    if golds is not None:
        tables += [_expected(rewards, golds, most), _expected(golds, golds, most)]
    intervals = [i.to_json() for i in bootstrap(np.concatenate(tables, axis=1), seed=seed)]
    rows = []
    for n in range(1, most + 1):
        row: dict[str, Any] = {"n": n, "reward": intervals[n - 1], "by_reward": None, "by_gold": None}
        recovered = None
        if golds is not None:
            row |= {"by_reward": intervals[most + n - 1], "by_gold": intervals[2 * most + n - 1]}
            gain, way = (table[:, n - 1] - table[:, 0] for table in tables[1:])
            recovered = ratio_of_means(gain, way, seed=seed) if n > 1 else None
        row["recovered"] = recovered.to_json() if recovered else None
        row["kl_bound"] = best_of_n_kl_bound(n) if one_sampler else None
        rows.append(row)
    return rows


def best_of_n_means(scores: ArrayLike, by: ArrayLike, n: int) -> Floats:
    """By prompt [P]: expected `scores` of the best of n of N answers chosen by `by`, both [P, N]."""
    table = np.asarray(scores, dtype=np.float64)
    if not 1 <= n <= table.shape[1]:
        raise ValueError(f"best of {n} needs at least {n} answers a prompt, there are {table.shape[1]}")
    return _sorted_by(np.asarray(by, dtype=np.float64), table) @ _subset_weights(table.shape[1])[n - 1]


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound of KL(best of n || policy) in nats: log n - (n - 1) / n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def _by_prompt(scores: Scores) -> list[Floats]:
    """One array of finite scores a prompt."""
    found = [_column(own) for own in scores]
    if not found or any(own.ndim != 1 or not own.size for own in found):
        raise ValueError(f"scores must be [prompts, samples] with a sample for every prompt, not {_shape(found)}")
    if not all(np.isfinite(own).all() for own in found):
        raise ValueError("scores hold a number that is not finite")
    return found


def _shape(scores: Sequence[Floats]) -> tuple[Any, ...]:
    sizes = sorted({own.size for own in scores})
    return (len(scores), sizes[0] if len(sizes) == 1 else sizes)


def _expected(keys: Sequence[Floats], values: Sequence[Floats], most: int) -> Floats:
    """[P, most]: expected value of the answer with the highest key among n of a prompt's answers, n = 1 .. most."""
    rows = zip(keys, values, strict=True)
    return np.stack([(_sorted_by(k[None], v[None]) @ _subset_weights(len(k))[:most].T)[0] for k, v in rows])


@cache
def _subset_weights(samples: int) -> Floats:
    """[N, N]: row n - 1 holds the chance of each rank (ascending) to be the best of a random subset of n.

    It is C(rank, n - 1) / C(N, n): n / N at the top, and from there down by (rank - n + 1) / rank, which takes no whole
    numbers of hundreds of digits.
    """
    n, rank = np.arange(1, samples + 1)[:, None], np.arange(samples - 1, 0, -1)
    down = np.maximum(rank + 1 - n, 0) / rank
    return np.cumprod(np.concatenate([n / samples, down], axis=1), axis=1)[:, ::-1]


def _sorted_by(keys: Floats, values: Floats) -> Floats:
    """Values [P, N] in ascending order of keys; of equal keys the lowest index comes last and wins."""
    order = np.argsort(keys[:, ::-1], axis=1, kind="stable")
    return np.take_along_axis(values[:, ::-1], order, axis=1)


def _length_baseline(longer: Floats) -> dict[str, Any] | None:
    by_longer, by_shorter = accuracy(longer), accuracy(-longer)
    if by_longer is None or by_shorter is None:
        return None
    if by_longer.mean >= by_shorter.mean:
        return {**by_longer.to_json(), "direction": "longer"}
    return {**by_shorter.to_json(), "direction": "shorter"}


def _column(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _json(proportion: Proportion | None) -> dict[str, float | int] | None:
    return proportion.to_json() if proportion else None
