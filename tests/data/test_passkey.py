from __future__ import annotations

import random

import pytest

from pipeline.data.passkey import KEY_WORDS, QUESTION, draw_key, filler, hide, statement


def test_texts() -> None:
    assert statement("4 8 2") == "The pass key is 4 8 2." and statement("4 8 2").startswith(QUESTION)
    key = draw_key(random.Random(0), 5)
    assert len(key.split()) == 5 and set(key.split()) <= set(KEY_WORDS)
    assert draw_key(random.Random(0), 5) == key


def test_filler_has_the_sentences_of_texts_but_none_about_the_pass_key() -> None:
    texts = ["Mira lives in Orl. The pass key is 1 2 3. Is it so? Yes!", "no end"]
    assert filler(texts) == [" Mira lives in Orl.", " Is it so?", " Yes!"]


def test_the_needle_stands_between_sentences_at_its_depth() -> None:
    sentences = [[1, 1], [2, 2, 2], [3]]
    needle = [9, 9]
    assert hide(sentences, needle, 10, 0.0, 0) == [9, 9, 1, 1, 2, 2, 2, 3, 1, 1]
    assert hide(sentences, needle, 10, 0.5, 0) == [1, 1, 2, 2, 2, 9, 9, 3, 1, 1]  # 4 of 8: the boundary at 5 is nearer
    assert hide(sentences, needle, 10, 1.0, 0) == [1, 1, 2, 2, 2, 3, 1, 1, 9, 9]
    assert hide(sentences, needle, 6, 0.0, 1) == [9, 9, 2, 2, 2, 3]
    assert hide(sentences, needle, 5, 1.0, 1) == [2, 2, 2, 9, 9]
    with pytest.raises(ValueError, match="a needle of 2 tokens does not fit into 1"):
        hide(sentences, needle, 1, 0.0, 0)
