"""Shares of sources by hand: which documents, how often, in which order."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.data.mixture import mix


def shares(tokens: dict[str, list[int]], chosen: list[tuple[str, int]]) -> dict[str, int]:
    return {name: sum(tokens[s][n] for s, n in chosen if s == name) for name in tokens}


def test_one_pass_reads_the_scarcest_source_once_and_less_of_the_others():
    """Half and half of 100 and 400 tokens: all of books, 100 tokens of web, in the order in which they stand there."""
    tokens = {"web": [10] * 40, "books": [50, 50]}
    chosen = mix(tokens, {"web": 1, "books": 1}, "one", seed=0)
    assert shares(tokens, chosen) == {"web": 100, "books": 100}
    assert max(Counter(chosen).values()) == 1
    web = [n for s, n in chosen if s == "web"]
    assert web == sorted(web) and chosen[10:] == [("books", 0), ("books", 1)]


def test_several_passes_read_everything_and_scarce_sources_again():
    """web once, books four times; at three to one books is read 4/3 times, the last third drawn."""
    tokens = {"web": [10] * 40, "books": [50, 50]}
    chosen = mix(tokens, {"web": 1, "books": 1}, "several", seed=0)
    assert chosen == [*(("web", n) for n in range(40)), *[("books", 0), ("books", 1)] * 4]
    tokens = {"web": [10] * 40, "books": [10] * 10}
    chosen = mix(tokens, {"web": 3, "books": 1}, "several", seed=0)
    assert shares(tokens, chosen) == {"web": 400, "books": 130}  # 133.3 wanted
    assert sorted(Counter(n for s, n in chosen if s == "books").values()) == [1] * 7 + [2] * 3


def test_sources_that_already_have_their_shares_are_read_once():
    tokens = {"a": [3] * 10, "b": [7] * 10, "c": [5]}
    everything = [(name, n) for name in tokens for n in range(len(tokens[name]))]
    for passes in ("one", "several"):
        assert mix(tokens, {"a": 30, "b": 70, "c": 5}, passes, seed=0) == everything  # type: ignore[arg-type]


def test_draws_follow_the_seed_and_not_the_other_sources():
    tokens = {"web": [10] * 40, "books": [50, 50]}
    web = [c for c in mix(tokens, {"web": 1, "books": 1}, "one", seed=0) if c[0] == "web"]
    assert web == mix({"web": [10] * 40, "all": [100]}, {"web": 1, "all": 1}, "one", seed=0)[:10]
    assert web != mix(tokens, {"web": 1, "books": 1}, "one", seed=1)[:10]


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.77])
def test_documents_of_unequal_lengths_come_near_their_share(wanted: float):
    lengths = [1 + (37 * n) % 90 for n in range(500)]
    tokens = {"web": lengths, "scarce": [round(sum(lengths) * wanted)]}
    found = shares(tokens, mix(tokens, {"web": 1, "scarce": 1}, "one", seed=3))
    assert abs(found["web"] - found["scarce"]) <= 90
