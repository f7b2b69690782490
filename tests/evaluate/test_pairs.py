"""Held-out comparisons as the scorecard takes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.evaluate.pairs import scored_pairs
from pipeline.evaluate.scorecard import scorecard
from pipeline.flow.errors import UserError
from pipeline.rollout.reward import Reward
from pipeline.rollout.scoring import score_samples
from tests.small import ask, chat, comparison, scorer

PAIRS = [
    comparison("q", "good", "bad one"),
    comparison("other", "a", "bb", "ccc", scores=[0.5, 2.0, 0.5]),  # bb above two that tie
    comparison("tied", "x", "y", scores=[1.0, 1.0]),
]


def test_every_ordered_pair_with_the_better_first():
    role = scorer(1)
    found = scored_pairs(PAIRS, Reward(role.module, chat(), 0.5), None, 999)
    assert found.length_chosen.tolist() == [4, 2, 2] and found.length_rejected.tolist() == [7, 1, 3]
    expected = []
    for asked, text in (
        ("q", "good"),
        ("other", "bb"),
        ("other", "bb"),
        ("q", "bad one"),
        ("other", "a"),
        ("other", "ccc"),
    ):
        ((score,),) = score_samples(role.module, [chat().prompt_ids(ask(asked))], [[chat().completion_ids(text)]])
        expected.append(score + 0.5)
    assert [*found.reward_chosen, *found.reward_rejected] == pytest.approx(expected, abs=1e-5)
    assert found.gold_chosen is None and not found.parts_chosen
    assert scorecard(found)["labels"]["count"] == 3


def test_the_judge_sees_finished_answers_to_the_same_prompts():
    seen = []

    def score(prompt, text, stopped):
        seen.append((prompt[0].content, text, stopped))
        return SimpleNamespace(total=float(len(text)), parts={"correct": float(text == "bb"), "ended": 1.0})

    found = scored_pairs(PAIRS, Reward(scorer(1).module, chat(), 0.0), SimpleNamespace(score=score), 999)
    assert found.gold_chosen.tolist() == [4, 2, 2] and found.gold_rejected.tolist() == [7, 1, 3]
    assert found.parts_chosen["correct"].tolist() == [0, 1, 1] and found.parts_rejected["ended"].tolist() == [1, 1, 1]
    assert ("other", "ccc", True) in seen and all(stopped for *_, stopped in seen)


def test_ties_alone_leave_nothing_to_judge_by():
    with pytest.raises(UserError, match="none of the 1 held-out comparisons orders its completions"):
        scored_pairs(PAIRS[2:], Reward(scorer(1).module, chat(), 0.0), None, 999)
