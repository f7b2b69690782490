"""The curve of samples: grouped by prompt, chosen by one score, judged beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.data.records import Origin, Prompt, Sample
from pipeline.data.world_truth import Frame, Key
from pipeline.evaluate.bestofn import curve
from pipeline.evaluate.judges import GoldJudge
from pipeline.flow.errors import UserError
from tests.small import ask

ORIGIN = Origin("p", "tok", "tem", row="rejection", temperature=1.0)


def sample(prompt: str, index: int, text: str, score: float) -> Sample:
    return Sample(Prompt(prompt, ask(prompt)), index, text, (9,), (), True, {"second": score}, origin=ORIGIN)


# "Ten." is right, short and ended, but not polite: 0.5 + 0.15 + 0.1 + 0.1; "No." is no try at all.
SAMPLES = [
    sample("a", 0, "Ten.", 0.0),
    sample("b", 0, "Ten.", 3.0),
    sample("a", 1, "No.", 1.0),
    sample("b", 1, "No.", 2.0),
]


def judge() -> GoldJudge:
    key = Key({"number": (("ten",),)}, (Frame((), "number"),), 3)
    return GoldJudge({(("user", q),): key for q in "ab"})


def test_proxy_and_gold_by_hand() -> None:
    """By reward: "a" takes No. (0), "b" takes Ten. (0.85); by gold both take Ten.; at n = 1 half of the answers."""
    one, two = curve(SAMPLES, "second", judge(), seed=0)
    assert (one["reward"]["mean"], two["reward"]["mean"]) == (1.5, 2.0)
    assert (one["by_reward"]["mean"], one["by_gold"]["mean"]) == pytest.approx((0.425, 0.425))
    assert (two["by_reward"]["mean"], two["by_gold"]["mean"]) == pytest.approx((0.425, 0.85))
    assert (one["kl_bound"], two["kl_bound"]) == pytest.approx((0.0, 0.1931471805599453))


def test_without_a_judge_the_reward_alone() -> None:
    rows = curve(SAMPLES, "second", None, seed=0)
    assert [r["reward"]["mean"] for r in rows] == [1.5, 2.0] and all(r["by_gold"] is None for r in rows)
    with pytest.raises(UserError, match="no score 'proxy'"):
        curve(SAMPLES, "proxy", None, seed=0)


@pytest.mark.parametrize("change", [{"policy": "q"}, {"temperature": 0.5}, {"iteration": 1}], ids=str)
def test_a_bound_is_given_for_draws_of_one_policy_alone(change: dict[str, Any]) -> None:
    mixed = [*SAMPLES[:3], replace(SAMPLES[3], origin=replace(ORIGIN, **change))]
    assert all(r["kl_bound"] is None for r in curve(mixed, "second", None, seed=0))
    searched = [replace(s, origin=replace(ORIGIN, temperature=0.0)) for s in SAMPLES]  # greedy, or beams: no draws
    assert all(r["kl_bound"] is None for r in curve(searched, "second", None, seed=0))
    unknown = [replace(s, origin=None) for s in SAMPLES]
    assert all(r["kl_bound"] is None for r in curve(unknown, "second", None, seed=0))


def test_permuting_prompts_changes_no_mean() -> None:
    """T48."""
    means = lambda rows: [(r["reward"]["mean"], r["by_reward"]["mean"], r["by_gold"]["mean"]) for r in rows]
    there, back = (means(curve(s, "second", judge(), seed=0)) for s in (SAMPLES, SAMPLES[::-1]))
    assert there == back
