"""From raw scores to what answers are trained on, by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from pipeline.algo.advantages import moments
from pipeline.algo.rewards import RunningMoments, combine, shape_scores, soft_overlong, whitened

F64 = torch.float64
ENSEMBLE = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]], dtype=F64)  # three models, two answers


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize(
    ("how", "k", "expected"),
    [
        ("mean", 9.0, [3.0, 1.0]),
        ("worst", 9.0, [1.0, 0.0]),
        ("uncertainty", 0.0, [3.0, 1.0]),
        ("uncertainty", 1.0, [3 - math.sqrt(14 / 3), 1 - math.sqrt(2)]),  # squares 4 + 1 + 9 and 1 + 1 + 4, over 3
        ("uncertainty", 0.5, [3 - math.sqrt(14 / 12), 1 - math.sqrt(0.5)]),
    ],
)
def test_ensembles_by_hand(how: Any, k: float, expected: list[float]):
    assert combine(ENSEMBLE, how, k).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty"])
def test_an_ensemble_of_one_is_that_model_to_the_last_bit(how: Any):
    one = t(0.1, -3.7, 1e-9)
    assert combine(one[None], how, 2.0).tolist() == one.tolist()


def test_soft_overlong_is_dapos_equation_13():
    """L_max 16, L_cache 4: 0 up to 12, ((16 - 4) - |y|) / 4 between, -1 beyond 16."""
    lengths = t(1, 12, 13, 14, 16, 17, 400)
    assert soft_overlong(lengths, 16, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]
    assert soft_overlong(lengths, 16, 4, penalty=2.0).tolist() == [0, 0, -0.5, -1, -2, -2, -2]


def batch(*values: float) -> torch.Tensor:
    return moments(t(*values), torch.ones(len(values)))


def test_running_moments_by_hand():
    """1, 2, 3 then 6, 8: mean 4 over five, squared deviations 9 + 4 + 1 + 4 + 16 = 34."""
    first = RunningMoments().update(batch(1, 2, 3))
    assert (first.count, first.mean, first.squares) == (3, 2, 2)
    both = first.update(batch(6, 8))
    assert (both.count, both.mean) == (5, 4) and both.squares == pytest.approx(34, abs=1e-12)
    assert both.std == pytest.approx(math.sqrt(6.8), abs=1e-12)
    assert both.normalise(t(4, 4 + math.sqrt(6.8))).tolist() == pytest.approx([0, 1], abs=1e-8)
    assert both.update(torch.zeros(3)) == both and RunningMoments().std == 0.0


def test_running_moments_are_those_of_everything_however_it_was_cut():
    """T20, T43: over four ranks, over iterations, or at once."""
    values = torch.randn(96, generator=torch.Generator().manual_seed(0), dtype=F64) * 3 + 40
    whole = RunningMoments().update(batch(*values.tolist()))
    assert whole.mean == pytest.approx(float(values.mean()), abs=1e-9)
    assert whole.std == pytest.approx(float(values.std(correction=0)), abs=1e-9)
    ranks = torch.stack([batch(*values[r::4].tolist()) for r in range(4)]).sum(0)
    steps = RunningMoments()
    for part in values.split(10):
        steps = steps.update(batch(*part.tolist()))
    for other in (RunningMoments().update(ranks), steps):
        assert (other.mean, other.std) == (pytest.approx(whole.mean, abs=1e-9), pytest.approx(whole.std, abs=1e-9))


def test_running_moments_go_on_from_json_to_the_last_bit():
    before = RunningMoments().update(batch(0.1, 0.2, 1 / 3))
    again = RunningMoments.from_state(json.loads(json.dumps(before.state())))
    assert again == before and again.update(batch(7.7)) == before.update(batch(7.7))
    with pytest.raises(ValueError, match=r"running statistics hold \['count', 'mean', 'squares'\], found \['count'\]"):
        RunningMoments.from_state({"count": 1.0})


def test_scores_that_are_all_the_same_stay_finite():
    same = RunningMoments().update(batch(0.3, 0.3, 0.3))
    assert same.normalise(t(0.3)).tolist() == pytest.approx([0.0], abs=1e-6)


def shaped(scores: list[float], lengths: list[int], stopped: list[bool], **options: Any) -> list[float]:
    return shape_scores(t(*scores), t(*lengths), torch.tensor(stopped), **options).tolist()


def test_without_options_scores_stay_to_the_last_bit():
    assert shaped([0.1, -7.3], [3, 4], [True, False]) == [0.1, -7.3]


def test_every_term_by_hand_and_in_its_order():
    """Scores 9, 1, 5 cut to 3; 0.5 a token; overlong from 2 to 4 tokens; the last one did not stop.

    9 -> 3 - 1.0 - 0 = 2.0;   1 -> 1 - 1.5 - 0.5 = -1.0;   5 -> 3 - 2.5 - 1 = -0.5, then as the options say.
    """
    given: Any = {"clip": 3.0, "token_penalty": 0.5, "overlong": (4, 2, 1.0)}
    scores, lengths, stopped = [9.0, 1.0, 5.0], [2, 3, 5], [True, True, False]
    assert shaped(scores, lengths, stopped, **given) == [2.0, -1.0, -0.5]
    assert shaped(scores, lengths, stopped, **given, unfinished_penalty=2.0) == [2.0, -1.0, -2.5]
    assert shaped(scores, lengths, stopped, **given, unfinished_score=-1.0) == [2.0, -1.0, -1.0]


def test_an_unfinished_answer_gets_exactly_its_score_whatever_its_length():
    """T41."""
    given: Any = {"token_penalty": 0.5, "overlong": (4, 2, 1.0), "clip": 0.5}
    assert shaped([9.0, -9.0], [3, 900], [False, False], **given, unfinished_score=-1.0) == [-1.0, -1.0]


def test_length_can_be_rewarded():
    assert shaped([0.0, 0.0], [1, 4], [True, True], token_penalty=-0.25) == [0.25, 1.0]


def test_whitening_by_hand():
    """1, 2, 3, 4: mean 2.5, biased variance 1.25."""
    white = [-1.3416407811, -0.4472135937, 0.4472135937, 1.3416407811]
    assert whitened(t(1, 2, 3, 4)).tolist() == pytest.approx(white, abs=1e-7)
    assert whitened(t(1, 2, 3, 4), shift_mean=False).tolist() == pytest.approx([x + 2.5 for x in white], abs=1e-7)
