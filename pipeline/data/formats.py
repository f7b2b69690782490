"""The formats that are read: how each is recognised, and how one of its rows becomes records.

A reader raises `Bad` with a reason. `FORMATS` is the table of contents; `data/README.md` shows a line of each
of our own records. `docs` of a format is what `rlhf data check` prints.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.lines import Bad, json_type
from pipeline.data.messages import (
    answer_text,
    as_prompt,
    check_conversation,
    check_prompt,
    history_messages,
    messages_of,
    need,
    sharegpt_message,
    sharegpt_messages,
    tools_of,
)
from pipeline.data.records import (
    Comparison,
    Completion,
    Conversation,
    Cost,
    Document,
    Message,
    Origin,
    Prompt,
    Rated,
    Sample,
)

Row = Mapping[str, Any]
Record = Document | Conversation | Comparison | Rated | Prompt | Sample


@dataclass(frozen=True)
class Format:
    """One format: `matches` looks at the keys of a row, `convert` makes its records (source: file:line)."""

    name: str
    kind: str
    matches: Callable[[Row], bool]
    convert: Callable[[Row, str], Iterable[Record]]
    docs: str


# Conversations


def _messages(row: Row, source: str) -> list[Record]:
    if "messages" not in row:
        raise Bad("missing messages", f"the keys are {', '.join(row)}")
    messages = messages_of(row["messages"])
    check_conversation(messages)
    return [Conversation(messages, tools_of(row.get("tools")), _source(row, source))]


def _sharegpt(row: Row, source: str) -> list[Record]:
    messages = sharegpt_messages(need(row, "conversations", list), row.get("system"))
    check_conversation(messages)
    return [Conversation(messages, tools_of(row.get("tools")), source)]


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    instruction = need(row, "instruction")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise Bad("input has the wrong type", f"input is {json_type(given)}, expected a string")
    system = [Message("system", row["system"])] if isinstance(row.get("system"), str) and row["system"] else []
    question = f"{instruction}\n\n{given}" if given and instruction else instruction or given
    return (*system, *history_messages(row.get("history")), Message("user", question))


def _alpaca(row: Row, source: str) -> list[Record]:
    messages = (*_alpaca_prompt(row), Message("assistant", need(row, "output")))
    check_conversation(messages)
    return [Conversation(messages, source=source)]


def _question_answer(row: Row, source: str) -> list[Record]:
    messages = (Message("user", need(row, "question")), Message("assistant", need(row, "answer")))
    check_conversation(messages)
    return [Conversation(messages, source=source)]


def _prompt_completion(row: Row, source: str) -> list[Record]:
    messages = (*as_prompt(need(row, "prompt", (str, list))), Message("assistant", _completion(row)))
    check_conversation(messages)
    return [Conversation(messages, source=source)]


def _completion(row: Row, key: str = "completion") -> str:
    value = need(row, key, (str, list, dict))
    if isinstance(value, str):
        return value
    return answer_text(messages_of([value] if isinstance(value, dict) else value, key))


# Comparisons


def _comparison(row: Row, source: str) -> list[Record]:
    prompt = as_prompt(need(row, "prompt", (str, list)))
    completions = []
    for i, c in enumerate(need(row, "completions", list)):
        if not isinstance(c, dict):
            raise Bad("completion is not an object", f"completion {i} is {json_type(c)}")
        completions.append(Completion(need(c, "text"), _rank(c.get("rank"), i), _score(c.get("score"), i)))
    annotator = row.get("annotator") if isinstance(row.get("annotator"), str) else None
    return [_checked(prompt, completions, _source(row, source), annotator)]


def _rank(value: Any, i: int) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise Bad("rank is not a whole number", f"completion {i}: {value!r}")
    if value is not None and abs(value) > 2**53:  # ranks are compared as floats, which are exact up to here
        raise Bad("rank is too large", f"completion {i}: expected at most 2**53")
    return value


def _score(value: Any, i: int | str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise Bad("score is not a number", f"completion {i}: {json_type(value)} {str(value)[:40]!r}")
    return float(value)


def _checked(
    prompt: tuple[Message, ...], completions: list[Completion], source: str, annotator: str | None = None
) -> Comparison:
    """The comparison, or Bad: too few completions, an empty one, mixed marks, one text with two marks."""
    if len(completions) < 2:
        raise Bad("fewer than two completions", f"{len(completions)}")
    marks = [(c.score, "score") if c.score is not None else (c.rank, "rank") for c in completions]
    if any(mark is None for mark, _ in marks) or len({kind for _, kind in marks}) > 1:
        raise Bad("completions without rank or score", "give every completion a rank, or every one a score")
    seen: dict[str, int] = {}
    for i, completion in enumerate(completions):
        if not completion.text.strip():
            raise Bad("empty assistant", f"completion {i} says nothing")
        first = seen.setdefault(completion.text, i)
        if marks[first] != marks[i]:
            raise Bad("identical chosen and rejected", f"completions {first} and {i} are the same text")
    return Comparison(prompt, tuple(completions), annotator, source)


def _pair(prompt: tuple[Message, ...], chosen: str, rejected: str, row: Row, source: str) -> list[Record]:
    if chosen == rejected:
        raise Bad("identical chosen and rejected")
    better, worse = (_score(row.get(k), k) for k in ("score_chosen", "score_rejected"))
    if (better is None) != (worse is None):
        raise Bad("score is missing", "only one of score_chosen and score_rejected is given")
    if better is None or worse is None:
        return [_checked(prompt, [Completion(chosen, 0), Completion(rejected, 1)], source)]
    if better < worse:
        raise Bad("scores contradict the choice", f"chosen has {better}, rejected {worse}")
    return [_checked(prompt, [Completion(chosen, score=better), Completion(rejected, score=worse)], source)]


def _trl_explicit(row: Row, source: str) -> list[Record]:
    """TRL's preference format with a prompt; chosen and rejected may repeat it (UltraFeedback)."""
    value = need(row, "prompt", (str, list))
    sides = [need(row, key, (str, list)) for key in ("chosen", "rejected")]
    if all(isinstance(s, str) for s in sides):
        return _pair(as_prompt(value), sides[0], sides[1], row, source)
    chosen, rejected = (messages_of(s, k) for s, k in zip(sides, ("chosen", "rejected"), strict=True))
    if len(chosen) == len(rejected) == 1:
        return _pair(as_prompt(value), answer_text(chosen), answer_text(rejected), row, source)
    shared = _shared_prompt(chosen, rejected)
    given = as_prompt(value)
    if shared[-len(given) :] != given:
        raise Bad("prompts differ", "the given prompt is not what chosen and rejected answer")
    return _pair(shared, answer_text(chosen[-1:]), answer_text(rejected[-1:]), row, source)


def _shared_prompt(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """What both dialogues say before their last turn."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1].role != "assistant":
            raise Bad("no answer at the end", f"{name} ends with a {side[-1].role} turn")
    if _words(chosen[:-1]) != _words(rejected[:-1]):
        raise Bad("prompts differ", "chosen and rejected differ before their last turn")
    if len(chosen) == 1:
        raise Bad("no prompt", "chosen and rejected share no turn")
    check_prompt(chosen[:-1])
    return chosen[:-1]


def _words(messages: tuple[Message, ...]) -> list[tuple[str, Any]]:
    return [(m.role, m.content) for m in messages]


def _trl_implicit(row: Row, source: str) -> list[Record]:
    """TRL's preference format without a prompt: it is what chosen and rejected share."""
    chosen, rejected = (need(row, key, (str, list)) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _message_pair(messages_of(chosen, "chosen"), messages_of(rejected, "rejected"), row, source)
    if chosen == rejected:
        raise Bad("identical chosen and rejected")
    at = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    at = min(len(chosen), len(rejected)) if at is None else at
    at -= at > 0 and chosen[at - 1] == " "  # the space before the answer is the answer's, as in TRL
    if not chosen[:at].strip():
        raise Bad("no prompt", "chosen and rejected share no beginning")
    return _pair((Message("user", chosen[:at]),), chosen[at:], rejected[at:], row, source)


def _message_pair(chosen: tuple[Message, ...], rejected: tuple[Message, ...], row: Row, source: str) -> list[Record]:
    prompt = _shared_prompt(chosen, rejected)
    return _pair(prompt, answer_text(chosen[-1:]), answer_text(rejected[-1:]), row, source)


def _messages_pair(row: Row, source: str) -> list[Record]:
    sides = [messages_of(need(row, k, list), k) for k in ("chosen_messages", "rejected_messages")]
    return _message_pair(sides[0], sides[1], row, source)


_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def hh_messages(transcript: str, name: str = "transcript") -> tuple[Message, ...]:
    r"""Turns of "\n\nHuman: ...\n\nAssistant: ..."; white space around a turn belongs to the transcript."""
    pieces = _HH_TURN.split(transcript)
    if pieces[0].strip() or len(pieces) < 3:
        raise Bad("not a transcript", f"{name} must begin with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], text.strip()) for who, text in zip(pieces[1::2], pieces[2::2], strict=True))


def _hh(row: Row, source: str) -> list[Record]:
    sides = [hh_messages(need(row, k), k) for k in ("chosen", "rejected")]
    return _message_pair(sides[0], sides[1], row, source)


def _sharegpt_pair(row: Row, source: str) -> list[Record]:
    prompt = sharegpt_messages(need(row, "conversations", list), row.get("system"))
    check_prompt(prompt)
    chosen, rejected = (answer_text([sharegpt_message(need(row, k, dict), 0)]) for k in ("chosen", "rejected"))
    return _pair(prompt, chosen, rejected, row, source)


def _alpaca_ranked(row: Row, source: str) -> list[Record]:
    """Alpaca with a list of outputs, best first."""
    texts = need(row, "output", list)
    return [_checked(_alpaca_prompt(row), _ranked(texts, range(len(texts))), source)]


def _ranked(texts: list[Any], ranks: Iterable[Any]) -> list[Completion]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise Bad("completion is not a string", f"completion {i} is {json_type(text)}")
    return [Completion(t, _rank(r, i)) for i, (t, r) in enumerate(zip(texts, ranks, strict=True))]


def _listed(row: Row, source: str) -> list[Record]:
    """A prompt, a list of responses, and a list of their ranks (0 or 1 best) or scores (higher is better)."""
    texts = need(row, _one_of(row, ("responses", "completions")), list)
    marks = need(row, _one_of(row, ("ranks", "scores")), list)
    if len(texts) != len(marks):
        raise Bad("lists of unequal length", f"{len(texts)} completions, {len(marks)} marks")
    prompt = as_prompt(need(row, "prompt", (str, list)))
    if "ranks" in row:
        return [_checked(prompt, _ranked(texts, marks), source)]
    plain = _ranked(texts, [None] * len(texts))
    scored = [Completion(c.text, score=_score(m, i)) for i, (c, m) in enumerate(zip(plain, marks, strict=True))]
    return [_checked(prompt, scored, source)]


def _one_of(row: Row, keys: tuple[str, ...]) -> str:
    return next((k for k in keys if k in row), keys[0])


def _pandalm(row: Row, source: str) -> list[Record]:
    """PandaLM: every annotator's verdict (0 tie, 1, 2) is a comparison of its own."""
    prompt = _alpaca_prompt(row)
    texts = [need(row, key) for key in ("response1", "response2")]
    out: list[Record] = []
    for name in sorted(k for k in row if re.fullmatch(r"annotator\d+", k)):
        if row[name] not in (0, 1, 2) or isinstance(row[name], bool):
            raise Bad("unknown verdict", f"{name} is {row[name]!r}, expected 0 (tie), 1 or 2")
        ranks = {0: (0, 0), 1: (0, 1), 2: (1, 0)}[row[name]]
        out.append(_checked(prompt, _ranked(texts, ranks), source, name))
    return out


def _oasst_tree(row: Row, source: str) -> list[Record]:
    """An OpenAssistant tree: each group of ranked sibling answers; unranked answers are left out."""
    out: list[Record] = []
    _walk(need(row, "prompt", dict), (), source, out)
    return out


def _walk(node: Row, before: tuple[Message, ...], source: str, out: list[Record]) -> None:
    roles = {"prompter": "user", "assistant": "assistant"}
    role = roles.get(need(node, "role"))
    if role is None:
        raise Bad("unknown role", f"{node['role']!r}, expected prompter or assistant")
    here = (*before, Message(role, need(node, "text")))
    replies = need(node, "replies", list) if node.get("replies") else []
    for reply in replies:
        if not isinstance(reply, dict):
            raise Bad("reply is not an object", f"it is {json_type(reply)}")
    ranked = [r for r in replies if role == "user" and r.get("rank") is not None]
    if len(ranked) > 1:
        out.append(_checked(here, _ranked([r.get("text") for r in ranked], [r["rank"] for r in ranked]), source))
    for reply in replies:
        _walk(reply, here, source, out)


# Rated, prompts, documents, samples


def _rated(row: Row, source: str) -> list[Record]:
    """A prompt, one completion, and `desirable` (ours) or `label` (TRL's unpaired preference)."""
    desirable = need(row, _one_of(row, ("desirable", "label")), bool)
    if "messages" in row:
        messages = messages_of(row["messages"])
        check_conversation(messages)
        prompt, text = messages[:-1], answer_text(messages[-1:])
        check_prompt(prompt)
    else:
        prompt, text = as_prompt(need(row, "prompt", (str, list))), _completion(row)
    if not text.strip():
        raise Bad("empty assistant", "the completion says nothing")
    return [Rated(prompt, text, desirable, _source(row, source))]


def _prompt(row: Row, source: str) -> list[Record]:
    messages = (
        as_prompt(row["messages"], "messages") if "messages" in row else as_prompt(need(row, "prompt", (str, list)))
    )
    name = row.get("id", row.get("prompt_id", source))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise Bad("id has the wrong type", f"id is {json_type(name)}, expected a string")
    return [Prompt(str(name), messages, _source(row, source), _answer(row))]


def _answer(row: Row) -> str | None:
    """The reference answer, a number as its text."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, type(None))):
        raise Bad("answer has the wrong type", f"answer is {json_type(answer)}, expected a string or a number")
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer)


def _question(row: Row, source: str) -> list[Record]:
    need(row, "answer", (str, int, float))
    return [Prompt(source, (Message("user", need(row, "question")),), source, _answer(row))]


def _alpaca_question(row: Row, source: str) -> list[Record]:
    return [Prompt(source, _alpaca_prompt(row), source)]


def _mt_bench(row: Row, source: str) -> list[Record]:
    turns = need(row, "turns", list)
    if not turns or not isinstance(turns[0], str):
        raise Bad("turns has the wrong form", "expected a list of questions")
    return [Prompt(str(row.get("question_id", source)), (Message("user", turns[0]),), source)]


def _text(row: Row, source: str) -> list[Record]:
    """A file may mix texts and whole dialogues."""
    if "messages" in row and not ("text" in row or "content" in row):
        return _dialogue(row, source)
    text = need(row, _one_of(row, ("text", "content")))
    if not text.strip():
        raise Bad("empty text")
    return [Document(text, source=_source(row, source))]


def _dialogue(row: Row, source: str) -> list[Record]:
    if "messages" not in row:
        return _text(row, source)
    messages = messages_of(row["messages"])
    check_conversation(messages)
    return [Document(messages=messages, source=_source(row, source))]


def _sample(row: Row, source: str) -> list[Record]:
    """Ids and log-probs may be missing: an answer can be scored, chosen and compared as a text alone."""
    prompt = _prompt(need(row, "prompt", dict), source)[0]
    assert isinstance(prompt, Prompt)
    ids = _numbers(row, "ids", int)
    logprobs, raw = (_numbers(row, key, float) for key in ("logprobs", "raw_logprobs"))
    for name, values in (("logprobs", logprobs), ("raw_logprobs", raw)):
        if values and len(values) != len(ids):
            raise Bad("lists of unequal length", f"{len(ids)} ids, {len(values)} {name}")
    index, text, stopped = need(row, "index", int), need(row, "text"), need(row, "stopped", bool)
    scores = _flat(row, "scores", dict, float)
    origin, cost = _flat(row, "origin", Origin, (str, float)), _flat(row, "cost", Cost, int)
    return [Sample(prompt, index, text, ids, logprobs, stopped, scores or {}, raw, origin, cost)]


def _numbers(row: Row, key: str, kind: type) -> tuple[Any, ...]:
    values = need(row, key, list) if key in row else []
    if wrong := [v for v in values if not _is(v, kind)]:
        raise Bad(f"{key} has the wrong type", f"{key} holds {json_type(wrong[0])}, expected numbers")
    return tuple(values)


def _flat(row: Row, key: str, make: Callable[..., Any], kind: type | tuple[type, ...]) -> Any:
    """What `make` makes of the object under `key`, whose values are of that kind; None where there is none."""
    if row.get(key) is None:
        return None
    value = need(row, key, dict)
    if wrong := [name for name, v in value.items() if not _is(v, kind)]:
        raise Bad(f"{key} has the wrong type", f"{key}.{wrong[0]} is {json_type(value[wrong[0]])}")
    try:
        return make(**value)
    except TypeError as error:
        raise Bad(f"unknown key in {key}", f"{key} has the keys {', '.join(value)}") from error


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a JSON value is of that kind; a whole number is a float too, and true is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, (*kinds, int) if float in kinds else kinds) and not isinstance(value, bool)


def _source(row: Row, source: str) -> str:
    return row["source"] if isinstance(row.get("source"), str) else source


def _keys(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(k in row for k in keys)


def _is_hh(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return "prompt" not in row and all(isinstance(s, str) and _HH_TURN.match(s) for s in sides)


def _is_own_comparison(row: Row) -> bool:
    completions = row.get("completions")
    return "prompt" in row and isinstance(completions, list) and any(isinstance(c, dict) for c in completions)


def _is_listed(row: Row) -> bool:
    return "prompt" in row and ("responses" in row or "completions" in row) and ("ranks" in row or "scores" in row)


def _is_rated(row: Row) -> bool:
    return ("desirable" in row or "label" in row) and ("messages" in row or "completion" in row)


def _is_ranked_alpaca(row: Row) -> bool:
    return "instruction" in row and isinstance(row.get("output"), list)


def _is_sharegpt(row: Row) -> bool:
    return "conversations" in row and "chosen" not in row


def _is_alpaca(row: Row) -> bool:
    return "instruction" in row and "output" in row and not isinstance(row["output"], list)


def _is_prompt_completion(row: Row) -> bool:
    return "prompt" in row and "completion" in row and not _is_rated(row)


def _is_messages(row: Row) -> bool:
    return "messages" in row and not _is_rated(row)


def _is_prompt(row: Row) -> bool:
    turns = row.get("messages")
    asks = isinstance(turns, list) and bool(turns) and isinstance(turns[-1], dict)
    return "prompt" in row or (asks and turns[-1].get("role") in ("user", "tool"))  # type: ignore[index]


FORMATS = (
    Format(
        "samples",
        "samples",
        _keys("prompt", "index", "text", "stopped"),
        _sample,
        "generated answers (own)",
    ),
    Format(
        "comparisons",
        "comparisons",
        _is_own_comparison,
        _comparison,
        "prompt and ranked or scored completions (own)",
    ),
    Format("ranked-lists", "comparisons", _is_listed, _listed, "prompt, responses, and ranks or scores"),
    Format("hh", "comparisons", _is_hh, _hh, "Anthropic HH transcripts, chosen and rejected"),
    Format(
        "trl-explicit",
        "comparisons",
        _keys("prompt", "chosen", "rejected"),
        _trl_explicit,
        "TRL preference, with prompt",
    ),
    Format(
        "sharegpt-pairs",
        "comparisons",
        _keys("conversations", "chosen", "rejected"),
        _sharegpt_pair,
        "ShareGPT with chosen and rejected",
    ),
    Format(
        "trl-implicit",
        "comparisons",
        _keys("chosen", "rejected"),
        _trl_implicit,
        "TRL preference, prompt implied",
    ),
    Format(
        "message-pairs",
        "comparisons",
        _keys("chosen_messages", "rejected_messages"),
        _messages_pair,
        "two message lists",
    ),
    Format("alpaca-ranked", "comparisons", _is_ranked_alpaca, _alpaca_ranked, "Alpaca, outputs best first"),
    Format(
        "pandalm",
        "comparisons",
        _keys("instruction", "response1", "response2"),
        _pandalm,
        "PandaLM, a verdict an annotator",
    ),
    Format(
        "oasst-tree",
        "comparisons",
        _keys("message_tree_id", "prompt"),
        _oasst_tree,
        "OpenAssistant message tree",
    ),
    Format("rated", "rated", _is_rated, _rated, "one completion, desirable or not (own, TRL unpaired)"),
    Format("sharegpt", "conversations", _is_sharegpt, _sharegpt, "ShareGPT turns: from, value"),
    Format("alpaca", "conversations", _is_alpaca, _alpaca, "Alpaca: instruction, input, output, history"),
    Format(
        "question-answer",
        "conversations",
        _keys("question", "answer"),
        _question_answer,
        "question and answer",
    ),
    Format(
        "prompt-completion",
        "conversations",
        _is_prompt_completion,
        _prompt_completion,
        "TRL prompt and completion",
    ),
    Format(
        "prompts",
        "prompts",
        _is_prompt,
        _prompt,
        "prompts: messages that end with a user turn (own), or a text",
    ),
    Format("messages", "conversations", _is_messages, _messages, "messages: role, content (own, OpenAI)"),
    Format("dialogues", "documents", _is_messages, _dialogue, "whole dialogues as documents (own)"),
    Format("questions", "prompts", _keys("question", "answer"), _question, "question and its reference answer (GSM8K)"),
    Format("mt-bench", "prompts", _keys("turns"), _mt_bench, "MT-Bench questions; the first turn"),
    Format("alpaca-prompts", "prompts", _keys("instruction"), _alpaca_question, "Alpaca without output"),
    Format(
        "text",
        "documents",
        lambda row: "text" in row or "content" in row,
        _text,
        "text or content (own)",
    ),
)
