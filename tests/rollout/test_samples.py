from __future__ import annotations

import json
import random

import pytest

from pipeline.data.records import Message, Prompt, Sample
from pipeline.flow.errors import UserError
from pipeline.rollout.samples import (
    best_conversations,
    best_of,
    best_worst_pairs,
    drop_useless,
    mine_pairs,
    read_samples,
    repeats,
    with_scores,
    write_samples,
)


def sample(prompt: str, index: int, text: str, score: float, stopped: bool = True, ids=(61, 12, 7)) -> Sample:
    asked = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", f"Say {prompt}."))
    logprobs = tuple(-0.25 * (i + 1) for i in range(len(ids)))
    return Sample(Prompt(prompt, asked, "here"), index, text, tuple(ids), logprobs, stopped, {"proxy": score})


SAMPLES = [
    sample("a", 0, "one", 0.5),
    sample("b", 0, "four", 1.0),
    sample("a", 1, "two", 2.0),
    sample("b", 1, "five", 1.0),
    sample("a", 2, "three", 2.0),
]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    assert write_samples(path, SAMPLES, seed=7) == 5
    row = json.loads(path.read_text().splitlines()[0])
    assert (row["seed"], row["tokens"], row["ids"]) == (7, 3, [61, 12, 7])
    assert read_samples(path) == SAMPLES


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    write_samples(path, SAMPLES)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40]]) + "\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2"):
        read_samples(path)


def test_the_best_of_a_prompt_and_of_ties_the_first():
    """T48."""
    assert [(s.prompt.id, s.index) for s in best_of(SAMPLES, "proxy")] == [("a", 1), ("b", 0)]


def test_shuffling_prompts_shuffles_what_comes_out():
    """T48: nothing depends on where a prompt stands."""
    rng = random.Random(0)
    many = [sample(f"p{p}", k, f"{p} {k}", rng.randrange(4)) for p in range(20) for k in range(5)]
    best = {s.prompt.id: s for s in best_of(many, "proxy")}
    pairs = {p.best.prompt.id: p for p in mine_pairs(many, "proxy")}
    rng.shuffle(many)
    assert {s.prompt.id: s for s in best_of(many, "proxy")} == best
    assert {p.best.prompt.id: p for p in mine_pairs(many, "proxy")} == pairs


def test_pairs_need_a_margin():
    (pair,) = mine_pairs(SAMPLES, "proxy")  # b is a tie
    assert (pair.best.index, pair.worst.index, pair.margin) == (1, 0, 1.5)
    assert mine_pairs(SAMPLES, "proxy", margin=1.5) == []
    with pytest.raises(UserError, match=r"no score 'gold' \(it has: proxy\)"):
        mine_pairs(SAMPLES, "gold")


def test_useless_samples_are_counted():
    samples = [
        sample("a", 0, " ", 0.0),
        sample("a", 1, "x", 0.0),
        sample("a", 2, "x", 9.0),
        sample("b", 0, "x", 0.0),
        sample("b", 1, "no no no", 0.0, ids=[5, 9] * 6),
        sample("b", 2, "cut", 0.0, stopped=False),
    ]
    kept, dropped = drop_useless(samples)
    assert [(s.prompt.id, s.index) for s in kept] == [("a", 1), ("b", 0), ("b", 2)]
    assert dropped == {"empty": 1, "duplicate": 1, "repetitive": 1}
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
def test_repetition_by_hand(ids, period, expected):
    assert repeats(ids, period) is expected


def test_records_made_of_the_best():
    mined = best_conversations([*SAMPLES, sample("c", 0, "cut", 9.0, stopped=False)], "proxy")
    assert mined.skipped == {"unfinished": 1, "prompts_without": 1}
    first = mined.records[0]
    assert [(m.role, m.content, m.weight) for m in first.messages] == [
        ("user", "Hi", None),
        ("assistant", "Yes?", 0.0),
        ("user", "Say a.", None),
        ("assistant", "two", 1.0),
    ]


def test_records_made_of_pairs():
    mined = best_worst_pairs(SAMPLES, "proxy", margin=1.0)
    (comparison,) = mined.records
    assert [(c.text, c.score) for c in comparison.completions] == [("two", 2.0), ("one", 0.5)]
    assert comparison.prompt == SAMPLES[0].prompt.messages
    assert comparison.pairs() == [(0, 1)]
    assert mined.skipped == {"prompts_without": 1}


def test_scores_by_source_stand_side_by_side():
    rescored = with_scores(SAMPLES[:2], "heldout", [0.1, 0.2])
    assert rescored[1].scores == {"proxy": 1.0, "heldout": 0.2}
    assert SAMPLES[1].scores == {"proxy": 1.0}
