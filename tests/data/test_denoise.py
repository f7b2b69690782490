"""Layouts on worked examples: the papers' own sentences, and what every draw keeps."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from pipeline.data.denoise import corrupt, cut_middle, fill_in, generator, noise_spans, span_counts, suffix_length

PARTY = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]


def test_the_figure_of_t5():
    """Figure 2 of Raffel et al. 2020: inputs and targets, the closing sentinel included."""
    words = {word: number for number, word in enumerate(PARTY)}
    inputs, targets = corrupt([words[w] for w in PARTY], [(2, 4), (8, 9)], [90, 91, 92])
    names = PARTY + [""] * 80 + ["<X>", "<Y>", "<Z>"]
    assert " ".join(names[i] for i in inputs) == "Thank you <X> me to your party <Y> week"
    assert " ".join(names[i] for i in targets) == "<X> for inviting <Y> last <Z>"


def test_a_span_at_the_end_needs_no_closing_sentinel():
    assert corrupt([1, 2, 3, 4], [(1, 2), (3, 4)], [90, 91]) == ([1, 90, 3, 91], [90, 2, 91, 4])


def test_prefix_middle_and_suffix_in_both_orders():
    """[1 2] [3] [4 5 6]; PRE, SUF and MID are 90, 91, 92 and carry no loss."""
    psm, weights = fill_in([1, 2], [3], [4, 5, 6], (90, 91, 92), spm=False)
    assert psm == [90, 1, 2, 91, 4, 5, 6, 92, 3]
    assert weights == [0, 1, 1, 0, 1, 1, 1, 0, 1]
    spm, weights = fill_in([1, 2], [3], [4, 5, 6], (90, 91, 92), spm=True)
    assert spm == [90, 91, 4, 5, 6, 92, 1, 2, 3]
    assert weights == [0, 0, 1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("n", "density", "mean", "counts"),
    [
        (512, 0.15, 3, (77, 26)),  # T5
        (512, 0.5, 3, (256, 85)),
        (512, 0.5, 64, (256, 4)),
        (10, 0.15, 3, (2, 1)),
        (2, 0.15, 3, (1, 1)),
        (1, 0.15, 3, (1, 1)),
        (6, 0.9, 1, (5, 1)),  # one token stays: there is room for one span only
    ],
)
def test_how_much_is_hidden(n: int, density: float, mean: float, counts: tuple[int, int]):
    assert span_counts(n, density, mean) == counts
    spans = noise_spans(n, density, mean, Random(0))
    assert (sum(b - a for a, b in spans), len(spans)) == counts


def test_spans_alternate_and_the_last_one_ends_the_text():
    for seed in range(200):
        spans = noise_spans(40, 0.4, 2, Random(seed))
        places = [0, *(place for span in spans for place in span)]
        assert places == sorted(set(places)) and places[-1] == 40


def test_every_way_of_cutting_is_as_likely():
    """4 hidden of 8 in 2 spans: 3 ways to cut the hidden, 3 to cut what is kept, 9 together; 900 draws."""
    seen = Counter(tuple(noise_spans(8, 0.5, 2, Random(seed))) for seed in range(900))
    assert len(seen) == 9 and sum((n - 100) ** 2 / 100 for n in seen.values()) < 26.1  # chi-square, 8 degrees, 0.001


def test_lengths_and_places_are_drawn_evenly():
    """A share of 0.5 cuts 5 tokens anywhere (1 to 4 are predicted), 0.25 of 8 gives 1 to 4."""
    assert {suffix_length(5, 0.5, Random(s)) for s in range(99)} == {1, 2, 3, 4}
    assert {suffix_length(8, 0.25, Random(s)) for s in range(99)} == {1, 2, 3, 4}
    assert suffix_length(2, 0.1, Random(0)) == suffix_length(1, 0.5, Random(0)) == 1
    found = Counter(cut_middle(1, Random(s)) for s in range(400))
    assert set(found) == {(0, 0), (0, 1), (1, 1)} and 160 < found[0, 1] < 240


def test_draws_depend_on_seed_record_and_window():
    first = [generator(*key).random() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert first[0] == first[4] and len(set(first)) == 4
