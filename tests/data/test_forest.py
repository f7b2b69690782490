"""The forest's layout by hand: positions, predictors, last tokens, budgets."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.forest import Segment, build, cut, size


def test_children_with_different_first_tokens_share_their_parents_last_token() -> None:
    forest = build([[Segment([5, 6, 7]), Segment([8, 9], 0), Segment([10], 0)]])
    assert forest.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert forest.positions_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert forest.predictor_T.tolist() == [-1, 0, 1, 2, 3, 2]  # a flat shift would give 4 for the last
    assert forest.segment_T.tolist() == [0, 0, 0, 1, 1, 2]
    assert forest.last_S.tolist() == [2, 4, 5]
    assert forest.groups == 1


def test_empty_reply_counts_as_its_parents_last_token() -> None:
    forest = build([[Segment([5, 6]), Segment([], 0), Segment([7], 1)], [Segment([])]])
    assert forest.length_S.tolist() == [2, 0, 1, 0]
    assert forest.last_S.tolist() == [1, 1, 2, -1]
    assert forest.predictor_T.tolist() == [-1, 0, 1]
    assert forest.positions_T.tolist() == [0, 1, 2]


def test_roots_have_no_predictor() -> None:
    forest = build([[Segment([1, 2])], [Segment([3, 4])]])
    assert forest.predictor_T.tolist() == [-1, 0, -1, 2]
    assert forest.positions_T.tolist() == [0, 1, 0, 1]
    assert forest.group_S.tolist() == [0, 1]


def test_values_stay_with_their_tokens_and_segments() -> None:
    groups = [
        [
            Segment([1, 2]),
            Segment([3, 4], 0, weights=[1.0, 0.5], tokens={"old": [-1.0, -2.0]}, facts={"pair": 7.0}),
        ],
        [Segment([5], facts={"pair": 9.0})],
    ]
    forest = build(groups)
    assert forest.weights_T.tolist() == [0, 0, 1, 0.5, 0]
    assert forest.tokens["old"].tolist() == [0, 0, -1, -2, 0]
    assert forest.facts["pair"].tolist() == [0, 7, 9]
    more = forest.with_tokens(new=torch.ones(5))
    assert set(more.tokens) == {"old", "new"} and more.cache is forest.cache
    assert len(forest) == 5 and forest.to("cpu") is forest


def test_a_parent_stands_before_its_child() -> None:
    with pytest.raises(ValueError, match="segment 0 of group 0: parent 1"):
        build([[Segment([1], 1), Segment([2])]])
    with pytest.raises(ValueError, match="weights: 1 values for 2 tokens"):
        build([[Segment([1, 2], weights=[1.0])]])


def test_nothing() -> None:
    forest = build([])
    assert len(forest) == 0 and forest.groups == 0


def test_cut_keeps_groups_whole_and_in_order() -> None:
    groups = [[Segment([0] * n)] for n in (3, 4, 2, 5)]
    assert [[size(g) for g in batch] for batch in cut(groups, 7)] == [[3, 4], [2, 5]]
    assert [[size(g) for g in batch] for batch in cut(groups, 5)] == [[3], [4], [2], [5]]
    with pytest.raises(ValueError, match="group 3 has 5 tokens, more than the token budget of 4"):
        list(cut(groups, 4))
