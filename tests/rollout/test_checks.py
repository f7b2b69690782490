"""Verifiable answers: what counts as right."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.rollout import checks
from pipeline.rollout.checks import exact_match, json_schema, numeric_answer, regular_expression
from tests.small import ask

Q = ask("q")


@pytest.mark.parametrize(
    ("text", "answer", "options", "right"),
    [
        ("Paris", "Paris", {}, True),
        ("  Paris \n", "Paris", {}, True),
        ("New\n  York", "New York", {}, True),
        ("ﬁve", "five", {}, True),  # NFKC takes the ligature apart
        ("paris", "Paris", {}, False),
        ("paris", "Paris", {"ignore_case": True}, True),
        ("STRASSE", "straße", {"ignore_case": True}, True),
        ("Paris.", "Paris", {}, False),
        ("Paris.", "Paris", {"ignore_punctuation": True}, True),
        ("The Hague", "Hague", {"ignore_articles": True}, True),
        ("Theatre", "atre", {"ignore_articles": True}, False),
        ("I think.\nAnswer: Paris", "Paris", {"after": "Answer:"}, True),
        ("Answer: Rome, no.\nAnswer: Paris\nBye.", "Paris", {"after": "Answer:"}, True),
        ("Answer:\nParis\nBye", "Paris", {"after": "Answer:"}, True),
        (r"so \boxed{f{o}o}.", "f{o}o", {"after": r"\boxed"}, True),
        (r"so \boxed{foo", "foo", {"after": r"\boxed"}, False),
        ("Paris", "Paris", {"after": "Answer:"}, False),
        ("", "", {}, True),
    ],
)
def test_exact_match(text: str, answer: str, options: dict[str, Any], right: bool):
    assert exact_match(Q, text, True, answer, **options) == float(right)


@pytest.mark.parametrize(
    ("text", "answer", "options", "right"),
    [
        ("It is 42.", "42", {}, True),
        ("6 times 7 is 42", "42", {}, True),
        ("42 is 6 times 7", "42", {}, False),  # the last number is 7
        ("1,234.50", "1234.5", {}, True),
        ("$1,234", "1234", {}, True),
        ("-$5", "-5", {}, True),
        ("$-5", "-5", {}, True),
        ("\u22125", "-5", {}, True),
        ("between 3-4", "4", {}, True),  # a range, not minus four
        ("x = -4", "-4", {}, True),
        ("1,2", "2", {}, True),  # no groups of three: two numbers
        ("12,3456", "3456", {}, True),
        (".5", "1/2", {}, True),
        ("2e3", "2000", {}, True),
        ("3 euros", "3", {}, True),
        ("3/4", "0.75", {}, True),
        (r"\frac{3}{4}", "0.75", {}, True),
        (r"-\dfrac{3}{4}", "-0.75", {}, True),
        (r"\frac{-3}{4}", "-0.75", {}, True),
        ("1 1/2 cups", "1.5", {}, True),
        ("-1 1/2", "-1.5", {}, True),
        ("3/0", "0", {}, False),
        ("CO2", "2", {}, False),  # digits of a word
        ("version 1.2.3", "3", {}, False),
        ("_42_", "42", {}, True),
        ("答案是42", "42", {}, True),
        ("no idea", "42", {}, False),
        ("50%", "50", {}, True),
        (r"50\%", "50", {}, True),
        ("50 %", "0.5", {"percent": "divide"}, True),
        ("50%", "50", {"percent": "divide"}, False),
        ("0.333", "1/3", {}, False),
        ("0.333", "1/3", {"tolerance": 0.001}, True),
        ("10.3", "10", {"tolerance": 0.3}, True),  # the bound belongs to it, in decimals
        ("10.31", "10", {"tolerance": 0.3}, False),
        ("103", "100", {"relative": 0.03}, True),
        ("-97", "-100", {"relative": 0.03}, True),
        ("104", "100", {"relative": 0.03}, False),
        ("so 5\n#### 42 apples, 7 days", "42", {"after": "####"}, True),
        ("#### 5\n#### 42\nand 9", "she has 6 * 7 = <<6*7=42>>42\n#### 42", {"after": "####"}, True),
        ("the answer is 42", "42", {"after": "####"}, False),
        (r"thus \boxed{x = \frac{1}{2}} and 3", "0.5", {"after": r"\boxed"}, True),
        ("1" * 201, "1" * 201, {}, None),
        ("1" * 201, "1", {}, False),
        ("9" * 100, "9" * 100, {}, True),
        ("1e999", "1", {}, False),
    ],
)
def test_numeric_answer(text: str, answer: str, options: dict[str, Any], right: bool | None):
    if right is None:
        with pytest.raises(ValueError, match="no number stands in the reference answer '1111"):
            numeric_answer(Q, text, True, answer, **options)
        return
    assert numeric_answer(Q, text, True, answer, **options) == float(right)


@pytest.mark.parametrize("check", [exact_match, numeric_answer])
def test_a_prompt_without_a_reference_answer_is_an_error(check: Any):
    """A silent 0 would train the policy on nothing."""
    with pytest.raises(ValueError, match='no reference answer: give its record an "answer"'):
        check(Q, "42", True, None)


def test_numbers_of_hostile_text_take_linear_time():
    """Long runs of digits, commas, spaces and slashes: seconds where the pattern backtracked over pairs of places."""
    for text in ("1" * 20_000, "1," * 10_000, "111," * 5_000 + "x", "1 " * 10_000, "1/" * 10_000, "-$" * 10_000):
        assert numeric_answer(Q, text, True, "42") == 0.0


def test_regular_expression():
    assert regular_expression(Q, "<answer>7</answer>", True, None, pattern="<answer>.+</answer>", whole=True) == 1.0
    assert regular_expression(Q, "so <answer>7</answer>", True, None, pattern="<answer>.+</answer>", whole=True) == 0.0
    assert regular_expression(Q, "so <ANSWER>", True, None, pattern="<answer>", ignore_case=True) == 1.0
    assert regular_expression(Q, "so", True, None, pattern="<answer>") == 0.0
    assert [regular_expression(Q, "a b a a", True, None, pattern="a", most=n) for n in (1, 2, 9)] == [1.0, 2.0, 3.0]


NAMED = {"type": "object", "required": ["name"]}


@pytest.mark.parametrize(
    ("text", "options", "right"),
    [
        ('{"name": "Mira"}', {}, True),
        (' {"name": "Mira"}\n', {}, True),
        ('{"nam": "Mira"}', {}, False),
        ('```json\n{"name": "Mira"}\n```', {}, True),
        ('```\n{"name": "Mira"}\n```', {}, True),
        ('```json\n{"name": "Mira"}\n```', {"fenced": False}, False),
        ('Here:\n```json\n{"name": "Mira"}\n```', {}, False),
        ('{"name": "Mira"} and more', {}, False),
        ('{"name": NaN}', {}, False),
        ('{"name": 1, "name": 2}', {}, False),
        ('{"name": ' + "[" * 70 + "]" * 70 + "}", {}, False),
        ("[" * 100_000, {}, False),
        ('{"name": ' + "1" * 5000 + "}", {}, False),
        ("", {}, False),
    ],
    ids=lambda x: str(x)[:30],
)
def test_json_schema(text: str, options: dict[str, Any], right: bool):
    assert json_schema(Q, text, True, None, schema=NAMED, **options) == float(right)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        ("exact_match", {"ignore_case": "yes"}, "ignore_case: Input should be a valid boolean (given: 'yes')"),
        ("exact_match", {"after": ""}, "after: String should have at least 1 character"),
        ("numeric_answer", {"tolerance": -1}, "tolerance: Input should be greater than or equal to 0"),
        ("numeric_answer", {"tolerance": True}, "tolerance: Input should be a valid number"),
        ("numeric_answer", {"percent": "drop"}, "percent: Input should be 'ignore' or 'divide'"),
        ("regular_expression", {"pattern": "(a"}, "'(a' is no regular expression"),
        ("json_schema", {"schema": {"typ": "object"}}, "schema.typ: this keyword is not read"),
    ],
)
def test_arguments_are_checked_before_anything_runs(check: str, arguments: dict[str, Any], message: str):
    found = checks.argument_problem(check, arguments)
    assert found is not None and found.startswith("arguments: ") and message in found


def test_arguments_that_are_right_have_no_problem():
    assert checks.argument_problem("numeric_answer", {"after": "####", "tolerance": 1, "relative": 0.5}) is None
    assert checks.argument_problem("exact_match", {"after": None, "ignore_case": True}) is None
    assert checks.argument_problem("json_schema", {"schema": NAMED}) is None
