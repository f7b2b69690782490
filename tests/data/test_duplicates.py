"""Duplicates: exact ones, near ones by a similarity that can be counted by hand, and how many MinHash finds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.data.duplicates import bands, jaccard, near_repeats, repeats, shingled, signature


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def test_the_first_of_the_same_texts_stays():
    assert repeats(["a b", "c", " a\n b ", "c", "A b"]) == [None, None, 0, 1, None]


def test_similarity_by_hand():
    """100 words have 96 runs of five. Without the last 10 there are 86, all shared: 86 / 96."""
    whole, most, half = (shingled(text) for text in (numbered(0, 100), numbered(0, 90), numbered(50, 150)))
    assert (whole.size, most.size) == (96, 86)
    assert jaccard(whole, most) == 86 / 96
    assert jaccard(whole, half) == 46 / 146
    assert shingled("One  two").size == 1 and shingled("...").size == 0


def test_near_duplicates_of_what_stays():
    """The third is near the second, which is left out, and not near the first: it stays."""
    texts = [numbered(0, 100), numbered(10, 110), numbered(20, 120), "Something else.", "something, else", "!!", "!!"]
    assert [round(jaccard(shingled(texts[0]), shingled(t)), 3) for t in texts[:3]] == [1.0, 0.811, 0.655]
    assert near_repeats(texts, 0.8) == [None, 0, None, None, 3, None, None]
    assert near_repeats(texts[:3], 0.82) == [None, None, None]


def test_a_signature_agrees_as_often_as_sets_are_similar():
    a, b = shingled(numbered(0, 400)), shingled(numbered(100, 500))
    agree = np.mean([np.mean(signature(a + np.uint64(i)) == signature(b + np.uint64(i))) for i in range(20)])
    assert agree == pytest.approx(296 / 496, abs=0.04)  # three standard deviations of 2,240 draws


def test_as_many_are_found_as_the_bands_promise():
    """1 - (1 - s^8)^14 of pairs at similarity s: at 62 of 66 runs shared nearly all, at a half hardly any."""
    draw = random.Random(0)

    def found(shared: int, runs: int) -> float:
        hits = 0
        for _ in range(200):
            one = [draw.randrange(2**63) for _ in range(2 * runs - shared)]
            a, b = np.array(sorted(one[:runs]), np.uint64), np.array(sorted(one[runs - shared :]), np.uint64)
            hits += bool(set(enumerate(bands(a))) & set(enumerate(bands(b))))
        return hits / 200

    for shared in (40, 48, 64):
        s = shared / (2 * 72 - shared)
        expected = 1 - (1 - s**8) ** 14
        assert found(shared, 72) == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 200) ** 0.5 + 0.005)
