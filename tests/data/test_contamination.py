"""Overlap with evaluation sets on texts whose words are numbers, so that runs can be counted."""

from __future__ import annotations

from pipeline.data.contamination import Overlap, pieces


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none():
    overlap = Overlap({"a": [numbered(0, 30)], "b": [numbered(10, 40)]})
    texts = [
        f"x {numbered(0, 12)} y",
        f"x {numbered(0, 13)} y",
        numbered(0, 13).upper().replace(" ", ", "),
        numbered(12, 26),
        "",
    ]
    found = overlap.find(texts, common=0)
    assert [sorted(f.sets) for f in found] == [[], ["a"], ["a"], ["a", "b"], []]
    assert [len(f.spans) for f in found] == [0, 1, 1, 2, 0]
    start, stop = found[1].spans[0]
    assert texts[1][start:stop] == numbered(0, 13)


def test_short_evaluation_texts_are_looked_for_whole():
    overlap = Overlap({"a": [numbered(0, 8), numbered(20, 27), "yes"]})
    assert overlap.short == {"a": 2}
    found = overlap.find([numbered(0, 20), numbered(0, 7), numbered(20, 40)], common=0)
    assert [bool(f.sets) for f in found] == [True, False, False]
    assert Overlap({"a": [numbered(0, 5)]}, n=5).short == {"a": 0}


def test_common_phrases_do_not_count():
    """One run in 4 texts, twice in one of them; another in 2."""
    overlap = Overlap({"a": [numbered(0, 13), numbered(50, 63)]})
    texts = [numbered(0, 13)] * 3 + [f"{numbered(0, 13)} and {numbered(0, 13)}"] + [numbered(50, 63)] * 2
    assert [bool(f.sets) for f in overlap.find(texts, common=4)] == [True] * 6
    assert [bool(f.sets) for f in overlap.find(texts, common=3)] == [False] * 4 + [True] * 2
    assert [bool(f.sets) for f in overlap.find(texts, common=0)] == [True] * 6


def test_what_is_left_when_a_run_is_cut_out():
    """1,000 characters, a run at 500 to 550: 200 more go on both sides, pieces of 300 and 250 stay."""
    text = "".join(chr(97 + i % 26) for i in range(1000))
    assert pieces(text, [(500, 550)]) == [text[:300], text[750:]]
    assert pieces(text, [(350, 400)]) == [text[600:]]  # 150 characters in front are too few
    assert pieces(text, [(500, 550), (510, 560)]) == [text[:300], text[760:]]
    assert pieces(text, [(0, 990)]) == []
    assert pieces(text, []) == [text]


def test_a_text_in_more_than_ten_pieces_is_left_out():
    text = "x" * 10_000
    assert len(pieces(text, [(at, at + 10) for at in range(800, 8000, 800)])) == 10
    assert pieces(text, [(at, at + 10) for at in range(800, 9000, 800)]) == []
