"""Choosing answers and mining pairs, by hand.

Prompt "a" has five finished answers, their scores in the order drawn:

    index   0     1     2     3     4
    text    one   two   three four  five
    score   0.5   2.0   2.0   1.0   -1.0
    ranked  1 (2.0)  2 (2.0)  3 (1.0)  0 (0.5)  4 (-1.0)        of equal scores the lowest index first
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pipeline.data.records import Message, Origin, Prompt, Sample
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.rollout.mining import (
    ChooseSettings,
    PairSettings,
    best_of,
    by_prompt,
    choose,
    drop_useless,
    mine,
    pairs_of,
    repeats,
)


def sample(prompt: str, index: int, text: str, score: float, stopped: bool = True, ids: Any = (61, 12, 7)) -> Sample:
    asked = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", f"Say {prompt}."))
    logprobs = tuple(-0.25 * (i + 1) for i in range(len(ids)))
    return Sample(Prompt(prompt, asked, "here"), index, text, tuple(ids), logprobs, stopped, {"proxy": score})


WORDS = ["one", "two", "three", "four", "five"]
GROUP = [sample("a", i, w, s) for i, (w, s) in enumerate(zip(WORDS, [0.5, 2.0, 2.0, 1.0, -1.0], strict=True))]
TIED = [sample("b", 0, "six", 1.0), sample("b", 1, "seven", 1.0)]


def chosen(samples: list[Sample], **settings: Any) -> list[str]:
    found = choose(samples, "proxy", ChooseSettings(**settings))
    return [str(c.messages[-1].content) for c in found.records]


def pairs(**settings: Any) -> list[tuple[int, int, float]]:
    draw = settings.pop("draw", 0)
    found = pairs_of(GROUP, "proxy", PairSettings(**settings), draw=draw)
    return [(p.better.index, p.worse.index, p.margin) for p in found]


# --- choosing ---


def test_the_best_of_a_prompt_and_of_ties_the_first() -> None:
    """T48: 2.0 stands at index 1 and 2; the tie of "b" goes to index 0."""
    assert [(s.prompt.id, s.index) for s in best_of([*TIED, *reversed(GROUP)], "proxy")] == [("b", 0), ("a", 1)]
    assert chosen([*GROUP, *TIED]) == ["two", "six"]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.2, ["two"]), (0.4, ["two", "three"]), (0.41, ["two", "three", "four"]), (0.01, ["two"])],
)
def test_an_upper_fraction_of_each_prompt_is_rounded_up(fraction: float, expected: list[str]) -> None:
    """0.4 of 5 answers are 2; 0.41 of 5 are 2.05, so 3; never none."""
    assert chosen(GROUP, by="fraction", fraction=fraction) == expected


def test_a_fraction_that_floats_cannot_hold_takes_no_answer_too_many() -> None:
    """0.28 * 25 is 7.000000000000001 in floats: 7 answers, not 8."""
    many = [sample("p", i, f"{i}", float(i)) for i in range(25)]
    assert chosen(many, by="fraction", fraction=0.28) == [str(i) for i in range(24, 17, -1)]


def test_a_threshold_takes_every_answer_that_reaches_it() -> None:
    assert chosen([*GROUP, *TIED], by="threshold", threshold=1.0) == ["two", "three", "four", "six", "seven"]
    found = choose([*GROUP, *TIED], "proxy", ChooseSettings(threshold=1.5))  # the best, where it reaches 1.5
    assert [c.messages[-1].content for c in found.records] == ["two"]
    assert found.skipped == {"below_threshold": 1, "prompts_without": 1}


def test_a_threshold_without_a_number_is_refused() -> None:
    with pytest.raises(UserError, match="give threshold a number"):
        parse_settings(ChooseSettings, {"by": "threshold"}, "choose")


def test_records_made_of_the_chosen() -> None:
    mined = choose([*GROUP, sample("c", 0, "cut", 9.0, stopped=False)], "proxy", ChooseSettings())
    assert mined.skipped == {"unfinished": 1, "prompts_without": 1}
    assert mined.passed_over == "unfinished: 1, prompts without: 1"
    (first,) = mined.records
    assert first.source == "here"
    assert [(m.role, m.content, m.weight) for m in first.messages] == [
        ("user", "Hi", None),
        ("assistant", "Yes?", 0.0),
        ("user", "Say a.", None),
        ("assistant", "two", 1.0),
    ]


# --- pairs ---


def test_best_against_worst() -> None:
    assert pairs() == [(1, 4, 3.0)]
    assert pairs(margin=3.0) == [(1, 4, 3.0)] and pairs(margin=3.01) == []


def test_of_two_worst_the_first_is_taken() -> None:
    """T48: the lowest score stands at index 0 and 2."""
    group = [sample("p", i, f"{i}", score) for i, score in enumerate([0.0, 1.0, 0.0])]
    (pair,) = pairs_of(group, "proxy", PairSettings())
    assert (pair.better.index, pair.worse.index) == (1, 0)


def test_best_against_a_random_lower_one() -> None:
    """Lower than 2.0 in rank order: 3, 0, 4; draw 0, 1, 2 takes one after another, and never the tied index 2."""
    assert [pairs(by="best_random", draw=d)[0] for d in range(4)] == [
        (1, 3, 1.0),
        (1, 0, 1.5),
        (1, 4, 3.0),
        (1, 3, 1.0),
    ]
    assert {pairs(by="best_random", margin=1.5, draw=d)[0][1] for d in range(10)} == {0, 4}
    assert pairs(by="best_random", margin=9.0) == []


def test_random_partners_follow_from_seed_and_prompt_alone() -> None:
    many = [sample(f"p{p}", k, f"{p} {k}", float(k)) for p in range(40) for k in range(4)]
    settings = PairSettings(by="best_random")
    partner = lambda samples, seed: {
        c.prompt[-1].content: c.completions[1].text for c in mine(samples, "proxy", settings, seed=seed).records
    }
    first = partner(many, 0)
    assert partner(many[80:] + many[:80], 0) == first != partner(many, 1)
    counts = Counter(text.split()[1] for text in first.values())
    assert set(counts) == {"0", "1", "2"} and min(counts.values()) >= 5  # of 40: every lower answer gets its share


def test_adjacent_ranks_step_from_score_to_score() -> None:
    """2.0 > 1.0 > 0.5 > -1.0: steps of 1.0, 0.5 and 1.5, the widest first; the tied index 2 is no rank of its own."""
    assert pairs(by="adjacent") == [(0, 4, 1.5), (1, 3, 1.0), (3, 0, 0.5)]
    assert pairs(by="adjacent", margin=1.0) == [(0, 4, 1.5), (1, 3, 1.0)]


def test_all_pairs_of_different_score() -> None:
    """Ten pairs less the tie (1, 2); differences of exactly the margin count."""
    assert len(pairs(by="all")) == 9
    assert pairs(by="all", margin=1.5) == [(1, 4, 3.0), (2, 4, 3.0), (3, 4, 2.0), (1, 0, 1.5), (2, 0, 1.5), (0, 4, 1.5)]


def test_at_most_m_pairs_of_a_prompt_those_with_the_largest_difference() -> None:
    assert pairs(by="all", per_prompt=2) == [(1, 4, 3.0), (2, 4, 3.0)]
    assert pairs(by="adjacent", per_prompt=1) == [(0, 4, 1.5)]


def test_records_made_of_pairs() -> None:
    mined = mine([*GROUP, *TIED], "proxy", PairSettings(), seed=0)
    (comparison,) = mined.records
    assert [(c.text, c.score) for c in comparison.completions] == [("two", 2.0), ("five", -1.0)]
    assert comparison.prompt == GROUP[0].prompt.messages and comparison.pairs() == [(0, 1)]
    assert (comparison.annotator, comparison.source) == ("proxy", "here")
    assert mined.skipped == {"prompts_without": 1}


# --- prompts ---


@pytest.mark.parametrize("by", ["best_worst", "best_random", "adjacent", "all"])
def test_permuting_samples_permutes_what_comes_out(by: Any) -> None:
    """T48: nothing depends on where a prompt stands, or in which order its samples do."""
    rng = random.Random(0)
    many = [sample(f"p{p}", k, f"{p} {k}", rng.randrange(4)) for p in range(20) for k in range(5)]
    found = lambda samples: {
        str((c.prompt, [y.text for y in c.completions]))
        for c in mine(samples, "proxy", PairSettings(by=by), seed=3).records
    }
    first = found(many), set(chosen(many, by="fraction", fraction=0.4))
    rng.shuffle(many)
    assert (found(many), set(chosen(many, by="fraction", fraction=0.4))) == first and len(first[0]) >= 15
    order = list(by_prompt(many))
    assert [c.messages[-2].content for c in choose(many, "proxy", ChooseSettings()).records] == [
        f"Say {p}." for p in order
    ]


def test_later_iterations_come_after_earlier_ones() -> None:
    """The same index in two iterations of PPO: of equal scores the earlier iteration goes first."""
    late, early = (replace(sample("a", 0, t, 1.0), origin=Origin(iteration=i)) for i, t in ((3, "late"), (1, "early")))
    assert [s.text for s in by_prompt([late, early])["a"]] == ["early", "late"]
    assert best_of([late, early], "proxy") == [early]


def test_one_id_for_two_prompts_is_refused() -> None:
    other = replace(GROUP[0], prompt=Prompt("a", (Message("user", "Something else"),)))
    with pytest.raises(UserError, match="prompt id 'a' stands for two different prompts"):
        by_prompt([GROUP[1], other])


def test_a_score_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"sample 0 of prompt b: no score 'gold' \(it has: proxy\)"):
        mine(TIED, "gold", PairSettings(), seed=0)


def test_useless_samples_are_counted() -> None:
    samples = [
        sample("a", 0, " ", 0.0),
        sample("a", 1, "x", 0.0),
        sample("a", 2, "x", 9.0),
        sample("b", 0, "x", 0.0),
        sample("b", 1, "no no no", 0.0, ids=[5, 9] * 6),
        sample("b", 2, "cut", 0.0, stopped=False),
        sample("b", 3, "a \u2400", 0.0),
        sample("b", 4, "no \0", 0.0),
    ]
    kept, dropped = drop_useless(samples)
    assert [(s.prompt.id, s.index) for s in kept] == [("a", 1), ("b", 0), ("b", 2)]
    assert dropped == {"empty": 1, "duplicate": 1, "repetitive": 1, "unreadable": 2}
    kept, dropped = drop_useless(samples, unfinished=True)
    assert len(kept) == 2 and dropped["unfinished"] == 1


@pytest.mark.parametrize(
    ("ids", "period", "expected"),
    [
        ([7] * 6, 1, True),
        ([7] * 5, 1, False),
        ([1, 2] * 6, 2, True),
        ([1, 2] * 5 + [1], 2, False),
        ([0, *([1, 2, 3] * 6), 9], 3, True),
        (list(range(30)), 1, False),
    ],
)
def test_repetition_by_hand(ids: list[int], period: int, expected: bool) -> None:
    assert repeats(ids, period) is expected
