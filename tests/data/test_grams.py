from __future__ import annotations

from hashlib import blake2b

from pipeline.data.grams import grams, mixed, words


def test_words_are_lower_case_without_punctuation_and_know_their_place():
    found, spans = words("  Don't -- stop, ÉTÉ_2!\n")
    assert found == ["dont", "stop", "été2"]
    assert spans == [(2, 7), (11, 16), (17, 23)]


def test_equal_runs_have_equal_numbers_and_others_do_not():
    a, b = grams(["the", "cat", "sat", "on", "the", "cat", "sat"], 3).tolist(), grams(["the", "cat", "sat"], 3).tolist()
    assert a[0] == a[4] == b[0] and len(set(a)) == 4
    assert grams(["x", "y"], 2).tolist() != grams(["y", "x"], 2).tolist()
    assert grams(["x"], 2).size == 0


def test_a_number_is_a_number_wherever_it_is_computed():
    """Digests of words as digits of a number, in wrapping arithmetic, its bits mixed; no process has its own."""
    river, orl = (int.from_bytes(blake2b(w, digest_size=8).digest(), "big") for w in (b"river", b"orl"))
    assert grams(["river", "orl"], 2).tolist() == mixed([(river * 0x9E3779B97F4A7C15 + orl) % 2**64]).tolist()
    assert mixed([0, 1]).tolist() == [0, 0x5692161D100B05E5]
