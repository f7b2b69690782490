"""Regular expressions over text that a model wrote."""

from __future__ import annotations

import pytest

from pipeline.rollout.patterns import LIMIT, Pattern


def test_somewhere_or_the_whole_text():
    pattern = Pattern("[0-9]+")
    assert pattern.found_in("about 42") and not pattern.found_in("none")
    assert pattern.found_in("42", whole=True) and not pattern.found_in("about 42", whole=True)
    assert Pattern("yes", ignore_case=True).found_in("YES") and not Pattern("yes").found_in("YES")


def test_only_the_beginning_of_a_very_long_text_is_searched():
    assert Pattern("x").found_in("a" * (LIMIT - 1) + "x")
    assert not Pattern("x").found_in("a" * LIMIT + "x")
    assert not Pattern("a+").found_in("a" * (LIMIT + 1), whole=True)  # cut, it would match


def test_a_pattern_that_explodes_is_an_error_and_no_score():
    """(a|aa)+$ tries 2^44 ways; a search without a limit would not come back."""
    with pytest.raises(ValueError, match=r"\(a\|aa\)\+\$' took more than 0.05 s on 46 characters: write it without"):
        Pattern("(a|aa)+$").found_in("a" * 45 + "b", seconds=0.05)


def test_what_is_no_pattern_is_named():
    with pytest.raises(ValueError, match=r"'\(a' is no regular expression: missing \)"):
        Pattern("(a")
