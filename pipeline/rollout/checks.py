r"""Answers that can be verified: functions that a plan may name as sources of reward, each 1 if right and 0 if not.

    functions:
      - {call: pipeline.rollout.checks.exact_match, arguments: {ignore_case: true}}
      - {call: pipeline.rollout.checks.numeric_answer, arguments: {after: "####", tolerance: 0.01}}
      - {call: pipeline.rollout.checks.regular_expression, arguments: {pattern: '<answer>.+</answer>', whole: true}}
      - {call: pipeline.rollout.checks.json_schema, arguments: {schema: {type: object, required: [name]}}}

All take (prompt, text, stopped, answer), then their own arguments by name; `answer` is the prompt's reference answer
(`Prompt.answer`). Whether an answer stopped is none of their business: `unfinished_score` sees to that. A prompt
without the reference answer that a check needs is an error, never a 0.

`after` names a marker, such as "####" or "\boxed": what counts is what follows its last occurrence, the group in
braces where one follows directly, else the rest of the line (of the next one where that is empty).
"""

from __future__ import annotations

import functools
import json
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.data.lines import DECODER, Bad, check_depth
from pipeline.data.records import Message
from pipeline.rollout.json_schema import Schema
from pipeline.rollout.patterns import Pattern

Prompt = Sequence[Message]
Marker = Annotated[str, Field(min_length=1)]
Size = Annotated[float, Field(ge=0)]
Percent = Literal["ignore", "divide"]

# ------------------------------------------------------------------------------------------------ exact match


def exact_match(
    prompt: Prompt,
    text: str,
    stopped: bool,
    answer: str | None,
    *,
    after: Marker | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_articles: bool = False,
) -> float:
    """Whether the text says exactly the reference answer.

    Both are brought to Unicode's NFKC form, with runs of white space as one space and none at the ends. The options
    are those of SQuAD's script (Rajpurkar et al. 2016): case, ASCII punctuation, the English articles.
    """
    options = (ignore_case, ignore_punctuation, ignore_articles)
    wanted = _plain(_reference(answer), *options)
    said = text if after is None else _marked(text, after)
    return float(said is not None and _plain(said, *options) == wanted)


def _plain(text: str, ignore_case: bool, ignore_punctuation: bool, ignore_articles: bool) -> str:
    text = unicodedata.normalize("NFKC", text)
    text = text.casefold() if ignore_case else text
    if ignore_punctuation:
        text = text.translate({ord(c): None for c in string.punctuation})
    if ignore_articles:
        text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def _reference(answer: str | None) -> str:
    if answer is None:
        raise ValueError('the prompt has no reference answer: give its record an "answer"')
    return answer


def _marked(text: str, marker: str) -> str | None:
    """What follows the last `marker`; None where it is not there, or opens a brace that never closes."""
    _, found, rest = text.rpartition(marker)
    if not found:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.partition("\n")[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:i]
    return None


# -------------------------------------------------------------------------------------------- numeric answer

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?: (?<![A-Za-z0-9)\]}}]) (?P<sign>[-+\u2212]) )?  # a hyphen behind a word or a bracket is no sign
    (?: \\?\$ [ ]? )?
    (?<![A-Za-z0-9]) (?<![0-9]\.)                      # no digits of a word or a version: H2O, v1.2
    (?:
        \\[dt]?frac \{{ (?P<top>[-\u2212]?{_WHOLE}) \}} \{{ (?P<bottom>{_WHOLE}) \}}
      | (?: (?P<mixed>{_WHOLE}) [ ] )? (?P<over>{_WHOLE}) [ ]? / [ ]? (?P<under>{_WHOLE})
      | (?P<decimal> (?: {_WHOLE} (?: \.[0-9]+ )? | \.[0-9]+ ) (?: [eE] [-+]? [0-9]{{1,3}} (?![0-9]) )? )
    )
    (?P<percent> [ ]? \\? % )?
    """,
    re.VERBOSE,
)
_DIGITS = 200  # characters of a number; a longer one is none


def numeric_answer(
    prompt: Prompt,
    text: str,
    stopped: bool,
    answer: str | None,
    *,
    after: Marker | None = None,
    tolerance: Size = 1e-6,
    relative: Size = 0.0,
    percent: Percent = "ignore",
) -> float:
    r"""Whether the text's number is the reference answer's: |difference| <= tolerance + relative * |reference|.

    The number is the first one behind the marker `after`, or without one the last of the text. The reference answer
    may carry the marker too (as GSM8K's do); without it, its last number counts.

    Numbers: 1,234.5 (commas only between groups of three), -3, +.5, 2e-3, fractions 3/4 and \frac{3}{4}, mixed ones
    1 1/2. A $ before and a % after are passed over; with percent: divide, 50% is 0.5. Not read: decimal commas, words.
    Fractions are exact: 1/3 equals 0.333 only within the tolerance.
    """
    wanted = _number(_reference(answer), after, percent, marker_needed=False)
    if wanted is None:
        raise ValueError(f"no number stands in the reference answer {answer!r:.60}")
    said = _number(text, after, percent, marker_needed=True)
    if said is None:
        return 0.0
    return float(abs(said - wanted) <= Fraction(repr(tolerance)) + Fraction(repr(relative)) * abs(wanted))


def _number(text: str, after: str | None, percent: Percent, marker_needed: bool) -> Fraction | None:
    behind = None if after is None else _marked(text, after)
    if behind is not None:
        return next(iter(_numbers(behind, percent)), None)
    if after is not None and marker_needed:
        return None
    return next(iter(reversed(_numbers(text, percent))), None)


def _numbers(text: str, percent: Percent) -> list[Fraction]:
    return [value for m in _NUMBER.finditer(text) if (value := _value(m, percent)) is not None]


def _value(match: re.Match[str], percent: Percent) -> Fraction | None:
    """The number of a match; None for one that is too long, or over 0."""
    if len(match[0]) > _DIGITS:
        return None
    parts = {name: text.replace(",", "").replace("\u2212", "-") for name, text in match.groupdict().items() if text}
    under = int(parts.get("bottom") or parts.get("under") or 1)
    if under == 0:
        return None
    if "decimal" in parts:
        value = Fraction(parts["decimal"])
    else:
        value = int(parts.get("mixed", 0)) + Fraction(int(parts.get("top") or parts["over"]), under)
    value = -value if parts.get("sign") == "-" else value
    return value / 100 if percent == "divide" and "percent" in parts else value


# ------------------------------------------------------------------------------- regular expression, schema


def regular_expression(
    prompt: Prompt,
    text: str,
    stopped: bool,
    answer: str | None,
    *,
    pattern: str,
    whole: bool = False,
    ignore_case: bool = False,
    most: Annotated[int, Field(ge=1)] = 1,
) -> float:
    """How often the pattern matches in the first 10,000 characters, counted up to `most`, or whether it matches exactly
    the `whole` text."""
    return float(_pattern(pattern, ignore_case).found_in(text, whole=whole, most=most))


_pattern = functools.cache(lambda pattern, ignore_case: Pattern(pattern, ignore_case=ignore_case))


def json_schema(
    prompt: Prompt,
    text: str,
    stopped: bool,
    answer: str | None,
    *,
    schema: Mapping[str, Any] | bool,
    fenced: bool = True,
) -> float:
    """Whether the text is one JSON value that the schema accepts; `pipeline.rollout.json_schema` says what is read of
    JSON Schema. JSON is read strictly: no NaN, no key twice, at most 64 levels. With `fenced`, the value may stand in
    a Markdown code fence that is the whole text.
    """
    body = text.strip()
    if fenced and (inside := _FENCE.fullmatch(body)):
        body = inside["body"]
    try:
        check_depth(body.encode("utf-8", "surrogatepass"))
        value = DECODER.decode(body)
    except (Bad, ValueError):
        return 0.0
    return float(_schema(json.dumps(schema)).accepts(value))


_FENCE = re.compile(r"```(?:json)?[ \t]*\n(?P<body>.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_schema = functools.cache(lambda text: Schema(json.loads(text)))


# ---------------------------------------------------------------------------------------- arguments, planned


def argument_problem(check: str, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments of a check, before anything runs; None where nothing is."""
    hints = get_type_hints(globals()[check], include_extras=True)
    for name, value in arguments.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            return f"arguments: {name}: {error.errors()[0]['msg']} (given: {value!r:.60})"
    try:
        if check == "regular_expression":
            Pattern(arguments["pattern"])
        if check == "json_schema":
            Schema(arguments["schema"])
    except ValueError as error:
        return f"arguments: {error}"
    return None
