from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluate.scorecard import (
    ScoredPairs,
    _subset_weights,
    accuracy,
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_means,
    differ_only_in,
    scorecard,
    wilson,
)


def test_wilson_published_example():
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, Wilson without continuity correction)."""
    got = wilson(81, 263)
    assert (round(got.low, 4), round(got.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20).low == 0.0 and wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20).high == 1.0 and wilson(0, 0) is None


def test_the_chances_of_a_rank_are_those_of_counting_subsets():
    """Of 5 answers the best of 2 is rank 1, 2, 3, 4 in 1, 2, 3, 4 of 10 subsets; all of a thousand end at the top."""
    assert _subset_weights(5)[1].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    for samples in (1, 2, 7, 40):
        exact = [[math.comb(r, n) / math.comb(samples, n + 1) for r in range(samples)] for n in range(samples)]
        np.testing.assert_allclose(_subset_weights(samples), exact, rtol=1e-12)
    many = _subset_weights(1000)
    np.testing.assert_allclose(many.sum(1), 1.0, rtol=1e-10)
    assert many[-1].tolist() == [0.0] * 999 + [1.0]


def test_a_tie_counts_half():
    assert accuracy([1.0, -1.0, 0.0, 2.0]).mean == 0.625
    with pytest.raises(ValueError, match="not finite"):
        accuracy([float("nan")])


def pairs(**changes) -> ScoredPairs:
    """Four pairs: clear and labelled right, clear and labelled wrong, close, equal but for correctness."""
    given = {
        "reward_chosen": [2.0, -1.0, 0.5, 1.0],
        "reward_rejected": [0.0, 1.0, 1.0, 0.0],
        "length_chosen": [10, 10, 10, 3],
        "length_rejected": [5, 5, 5, 5],
        "gold_chosen": [1.0, 0.0, 0.5, 0.6],
        "gold_rejected": [0.0, 1.0, 0.4, 0.5],
        "parts_chosen": {"correct": [1, 0, 1, 1], "polite": [1, 1, 0, 1]},
        "parts_rejected": {"correct": [0, 1, 1, 0], "polite": [0, 1, 1, 1]},
    }
    return ScoredPairs(**{**given, **changes})


def test_scorecard_by_hand():
    card = scorecard(pairs())
    assert card["labels"]["mean"] == 0.5 and card["labels"]["count"] == 4
    assert card["clear_gap"] == pytest.approx(np.std([1, 0, 0.5, 0.6, 0, 1, 0.4, 0.5]))
    assert card["clear"]["mean"] == 1.0 and card["clear"]["count"] == 2  # it sees through the wrong label
    assert card["clear_labellers"]["mean"] == 0.5
    assert card["correctness"]["mean"] == 1.0 and card["correctness"]["count"] == 2  # pairs 1 and 3
    assert card["length"]["mean"] == 0.75 and card["length"]["direction"] == "longer"
    assert card["margin"] == pytest.approx(0.125)


def test_a_model_of_length_alone_is_no_better_than_the_baseline():
    lengths = {"reward_chosen": [10, 10, 10, 3], "reward_rejected": [5, 5, 5, 5]}
    card = scorecard(pairs(**lengths))
    assert card["labels"]["mean"] == card["length"]["mean"]
    shorter = scorecard(pairs(length_chosen=[1, 1, 1, 9]))
    assert shorter["length"] == {**shorter["length"], "mean": 0.75, "direction": "shorter"}


def test_without_a_judge_and_without_pairs():
    card = scorecard(pairs(gold_chosen=None, gold_rejected=None, parts_chosen={}, parts_rejected={}))
    assert card["labels"] and card["clear"] is card["correctness"] is card["clear_gap"] is None
    none = dict.fromkeys(("reward_chosen", "reward_rejected", "length_chosen", "length_rejected"), ())
    assert scorecard(ScoredPairs(**none))["labels"] is None


def test_differ_only_in():
    a, b = (
        {"correct": [1, 0, 1, 1], "polite": [1, 1, 0, 1]},
        {"correct": [0, 1, 0, 1], "polite": [1, 1, 1, 1]},
    )
    assert differ_only_in(a, b, "correct").tolist() == [1.0, -1.0, 0.0, 0.0]
    assert differ_only_in(a, b, "brave") is None


def enumerate_best(keys, values, n) -> float:
    """Mean over all subsets in which the first of the largest keys is taken."""
    subsets = list(itertools.combinations(range(len(keys)), n))
    return float(np.mean([values[max(s, key=lambda i: (keys[i], -i))] for s in subsets]))


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    reward, gold = rng.integers(0, 4, (5, 6)).astype(float), rng.random((5, 6))  # with ties
    rows = best_of_n(reward, gold, seed=0)
    assert [r["n"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        want = np.mean([enumerate_best(r, g, row["n"]) for r, g in zip(reward, gold, strict=True)])
        top = np.mean([enumerate_best(g, g, row["n"]) for g in gold])
        assert row["by_reward"]["mean"] == pytest.approx(want)
        assert row["by_gold"]["mean"] == pytest.approx(top)
        chance = gold.mean()
        if row["n"] > 1:
            assert row["recovered"]["mean"] == pytest.approx((want - chance) / (top - chance))
    assert rows[0]["recovered"] is None and rows[0]["by_reward"]["mean"] == pytest.approx(gold.mean())
    assert rows[-1]["by_gold"]["mean"] == pytest.approx(gold.max(1).mean())


def test_prompts_with_more_answers_than_others_use_them_all():
    """[0, 1, 2] and [0, 4]: best of 2 is (1 + 2 + 2) / 3 = 5/3 of the three pairs of the first, 4 of the second."""
    rows = best_of_n([[0.0, 1.0, 2.0], [0.0, 4.0]], None, seed=0)
    assert [r["n"] for r in rows] == [1, 2]
    assert rows[0]["reward"]["mean"] == pytest.approx((1 + 2) / 2)
    assert rows[1]["reward"]["mean"] == pytest.approx((5 / 3 + 4) / 2)
    assert all(r["by_reward"] is r["by_gold"] is r["recovered"] is None for r in rows)
    assert [r["kl_bound"] for r in rows] == pytest.approx([0.0, 0.1931471805599453])
    gold = [[9.0, 6.0, 3.0], [0.0, 1.0]]  # of the three answers the reward prefers what gold likes least
    rows = best_of_n([[0.0, 1.0, 2.0], [0.0, 4.0]], gold, seed=0, one_sampler=False)
    assert rows[1]["by_reward"]["mean"] == pytest.approx(((6 + 3 + 3) / 3 + 1) / 2)
    assert rows[1]["by_gold"]["mean"] == pytest.approx(((9 + 9 + 6) / 3 + 1) / 2)
    assert [r["kl_bound"] for r in rows] == [None, None]


def test_the_reward_of_the_best_is_the_mean_over_all_subsets():
    reward = np.random.default_rng(1).random((4, 5))
    for row in best_of_n(reward, None, seed=0):
        want = np.mean([enumerate_best(r, r, row["n"]) for r in reward])
        assert row["reward"]["mean"] == pytest.approx(want)
    with pytest.raises(ValueError, match="not finite"):
        best_of_n([[0.0, float("inf")]], None, seed=0)
    with pytest.raises(ValueError, match="a sample for every prompt"):
        best_of_n([[0.0], []], None, seed=0)


def test_recovery_of_a_perfect_a_useless_and_a_perverse_reward():
    rng = np.random.default_rng(0)
    gold = rng.random((200, 8))
    assert best_of_n(gold, gold, seed=0)[-1]["recovered"]["mean"] == pytest.approx(1.0)
    useless = best_of_n(rng.random((200, 8)), gold, seed=0)[-1]["recovered"]
    assert useless["low"] < 0 < useless["high"]
    assert best_of_n(-gold, gold, seed=0)[-1]["recovered"]["high"] < 0
    same = np.ones((10, 4))
    assert best_of_n(same, same, seed=0)[-1]["recovered"] is None


def test_permuting_prompts_permutes_what_is_chosen():
    rng = np.random.default_rng(0)
    reward, gold, order = rng.random((7, 5)), rng.random((7, 5)), rng.permutation(7)
    assert np.array_equal(best_of_n_means(gold, reward, 3)[order], best_of_n_means(gold[order], reward[order], 3))
    with pytest.raises(ValueError, match="best of 6"):
        best_of_n_means(gold, reward, 6)


def test_kl_bound():
    """log n - (n - 1) / n at 2, 4, 16 and 64."""
    got = [best_of_n_kl_bound(n) for n in (2, 4, 16, 64)]
    assert got == pytest.approx([0.1931471805599453, 0.6362943611198906, 1.8350887222397811, 3.1745080833596715])


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        best_of_n(np.ones((2, 3)), np.ones((2, 2)), seed=0)
