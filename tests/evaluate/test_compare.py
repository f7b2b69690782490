from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.compare import (
    bootstrap,
    bootstrap_mean,
    compare_policies,
    paired_difference,
    prompt_means,
    share_of_gap,
    win_rate,
    win_rates_by_part,
    wins,
)


def test_wins_split_ties_by_prompt():
    assert wins([3.0, 1.0, 2.0], [1.0, 3.0, 2.0]).tolist() == [1.0, 0.0, 0.5]
    assert wins([0.1 + 0.2], [0.3]).tolist() == [0.5]  # rounding is not a win


def test_wins_compare_all_answers_of_a_prompt():
    ours, theirs = [[1.0, 3.0], [0.0, 0.0]], [[2.0, 2.0, 1.0], [0.0, 1.0, -1.0]]
    # prompt 0: 1 loses, loses, ties; 3 wins thrice. prompt 1: tie, loss, win, twice.
    assert wins(ours, theirs).tolist() == pytest.approx([3.5 / 6, 3 / 6])


def test_means_by_prompt_do_not_weigh_prompts_by_answers():
    names, means = prompt_means(["b", "a", "b", "b"], [1.0, 5.0, 2.0, 3.0])
    assert names == ["b", "a"] and means.tolist() == [2.0, 5.0]


def test_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(1.0, 2.0, 500)
    got = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(500)
    assert got.mean == values.mean()
    assert got.high - got.mean == pytest.approx(half, rel=0.08)
    assert got.mean - got.low == pytest.approx(half, rel=0.08)


def test_intervals_repeat_with_their_seed_and_in_company():
    values = np.random.default_rng(0).random((60, 3))
    assert bootstrap(values, seed=5) == bootstrap(values, seed=5) != bootstrap(values, seed=6)
    alone = bootstrap_mean(values[:, 1], seed=5)
    together = bootstrap(values, seed=5)[1]
    assert (alone.low, alone.high) == pytest.approx((together.low, together.high))


def test_prompts_are_drawn_not_answers():
    """Ten copies of every answer carry no more evidence."""
    one = np.random.default_rng(0).normal(size=(40, 1))
    once, repeated = bootstrap_mean(one, seed=0), bootstrap_mean(np.repeat(one, 10, axis=1), seed=0)
    assert (once.low, once.high) == pytest.approx((repeated.low, repeated.high))


def test_paired_differences_do_not_see_how_hard_prompts_are():
    rng = np.random.default_rng(0)
    hard, noise = rng.normal(0, 10, 300), rng.normal(0, 0.1, 300)
    got = paired_difference(hard + 0.1 + noise, hard, seed=0)
    assert 0.05 < got.low < got.mean < got.high < 0.15
    assert paired_difference(hard, hard, seed=0).high == 0.0


def test_win_rate_covers_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(60):
        a, b = rng.normal(0.3, 1, 120), rng.normal(0, 1, 120)
        rate = win_rate(a, b, seed=trial)
        covered += rate.low <= 0.584 <= rate.high  # P(N(0.3, sqrt 2) > 0)
    assert covered >= 52


def test_wins_by_part():
    ours, theirs = (
        {"correct": [1, 1, 0], "polite": [0, 0, 0]},
        {"correct": [0, 1, 1], "polite": [1, 1, 1], "x": [0]},
    )
    got = win_rates_by_part(ours, theirs, seed=0)
    assert list(got) == ["correct", "polite"]
    assert got["correct"].mean == 0.5 and got["polite"].mean == got["polite"].high == 0.0
    assert win_rates_by_part({}, theirs, seed=0) == {}


def test_share_of_gap():
    start, top = np.array([0.2, 0.4, 0.3, 0.1]), np.array([0.6, 0.8, 0.7, 0.5])
    assert share_of_gap((start + top) / 2, start, top, seed=0).mean == pytest.approx(0.5)
    assert share_of_gap(top, start, start, seed=0) is None
    noisy = start + np.array([0.5, -0.5, 0.5, -0.4])
    assert share_of_gap(top, start, noisy, seed=0) is None  # not clearly above


def test_compare_policies_fills_the_evaluation_row():
    scores = {"sft": [0.0, 0.0, 1.0], "ppo": [1.0, 1.0, 1.0], "dpo": [0.0, 1.0, 1.0]}
    parts = {name: {"correct": s, "polite": [1.0, 1.0, 1.0]} for name, s in scores.items()}
    got = compare_policies(scores, reference="sft", parts=parts, seed=0)
    assert got["sft"]["win_rate"] is None and got["sft"]["win_rate_parts"] == {}
    assert got["ppo"]["win_rate"]["vs"] == "sft" and got["ppo"]["win_rate"]["mean"] == pytest.approx(5 / 6)
    assert got["ppo"]["win_rate_parts"]["polite"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert got["dpo"]["against"]["ppo"]["difference"]["mean"] == pytest.approx(-1 / 3)
    assert got["ppo"]["against"]["dpo"]["win_rate"]["mean"] == pytest.approx(4 / 6)
    assert set(got["ppo"]["against"]) == {"sft", "dpo"}
    alone = compare_policies({"sft": [1.0]}, reference="sft", seed=0)
    assert alone == {"sft": {"win_rate": None, "against": {}}}


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: wins([1.0, 2.0], [1.0]), "same prompts"),
        (lambda: paired_difference([1.0, 2.0], [1.0], seed=0), "same prompts"),
        (lambda: bootstrap_mean([], seed=0), "no scores"),
        (lambda: bootstrap_mean([1.0, float("nan")], seed=0), "not finite"),
        (lambda: compare_policies({"a": [1.0]}, reference="b", seed=0), "not among the policies: a"),
        (lambda: prompt_means(["a"], [1.0, 2.0]), "2 values for 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
