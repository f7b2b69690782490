"""Foreign turns to `Message`, and the rules that a list of turns must keep.

Turns alternate: an optional system turn first, then user and assistant in turn; an assistant may be followed
by tool results, and tool results by an assistant or by further results. A trailing user turn is legal in a
conversation (it is never trained on) and a prompt must end with a user or tool turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.lines import DECODER, Bad, check_characters, check_depth, json_type
from pipeline.data.records import ROLES, Message
from pipeline.data.template import message_text

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


def need(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...] = str) -> Any:
    """row[key] of the right type, or Bad naming the key."""
    if key not in row:
        raise Bad(f"missing {key}", f"the keys are {', '.join(map(str, row)) or 'none'}")
    value = row[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = {str: "a string", list: "a list", dict: "an object", int: "a number", bool: "true or false"}
        wanted = " or ".join(dict.fromkeys(words.get(k, "a number") for k in kinds))
        raise Bad(f"{key} has the wrong type", f"{key} is {json_type(value)}, expected {wanted}")
    return value


def messages_of(value: Any, key: str = "messages") -> tuple[Message, ...]:
    """OpenAI-style turns. Raises Bad naming the turn, counted from 0."""
    if not isinstance(value, list):
        raise Bad(f"{key} is not a list", f"it is {json_type(value)}")
    if not value:
        raise Bad(f"{key} is empty")
    return tuple([_message(turn, i) for i, turn in enumerate(value)])


def _message(turn: Any, i: int) -> Message:
    if not isinstance(turn, dict):
        raise Bad("turn is not an object", f"turn {i} is {json_type(turn)}")
    role = turn.get("role")
    if role is None:
        raise Bad("missing role", f"turn {i}")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise Bad("unknown role", f"turn {i} has role {role!r}, expected one of {', '.join(ROLES)}")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Bad("tool_calls is not a list", f"turn {i}")
    content = turn.get("content")
    if "content" not in turn and not calls:
        raise Bad("missing content", f"turn {i}")
    if type(content) is str and len(turn) == 2:
        return Message(role, content)
    parts, more = _content(content, bool(calls), i)
    return Message(
        role,
        parts,
        tool_calls=tuple(_tool_call(c, i) for c in (*calls, *more)),
        name=turn.get("name") if isinstance(turn.get("name"), str) else None,
        weight=_weight(turn, i),
    )


def _content(content: Any, has_calls: bool, i: int) -> tuple[str | tuple[dict[str, Any], ...] | None, list[Any]]:
    if isinstance(content, str):
        return content, []
    if content is None:
        if not has_calls:
            raise Bad("content is null", f"turn {i} has no tool_calls beside it")
        return None, []
    if not isinstance(content, list):
        raise Bad("content has the wrong type", f"turn {i}: content is {json_type(content)}, expected a string")
    parts: list[dict[str, Any]] = []
    calls: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind in ("text", "reasoning", "thinking") and isinstance(text, str):
            parts.append({"type": "text" if kind == "text" else "reasoning", "text": text})
        elif kind == "tool_call" and text is not None:
            calls.append(text)
        else:
            raise Bad("unsupported part", f"turn {i}: a part of type {kind!r}; text and reasoning are read")
    if all(p["type"] == "text" for p in parts):
        return "".join(p["text"] for p in parts) if parts or not calls else None, calls
    return tuple(parts), calls


def _tool_call(call: Any, i: int) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}} whichever way it was written."""
    if isinstance(call, str):
        call = parse_json(call, f"turn {i}: tool call")
    if not isinstance(call, dict):
        raise Bad("tool call is not an object", f"turn {i}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Bad("tool call without a name", f"turn {i}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"turn {i}: arguments of {function['name']}")
    _need_json(arguments, f"turn {i}: arguments of {function['name']}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def parse_json(text: str, what: str) -> Any:
    """JSON that a row holds as a string, under the rules for the row itself."""
    try:
        check_depth(text.encode())
        value = DECODER.decode(text)
        check_characters(value)
        return value
    except (Bad, ValueError, RecursionError) as error:
        raise Bad("invalid JSON in a string", f"{what}: {error}") from None


def _need_json(value: Any, what: str) -> None:
    """Rows of a table can hold what JSON cannot: dates, bytes, NaN."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Bad("not a JSON value", f"{what}: {error}") from None


def _weight(turn: Mapping[str, Any], i: int) -> float | None:
    weight = turn.get("weight", turn.get("loss_weight"))
    if weight is None:
        return None
    if weight not in (0, 1):
        raise Bad("weight is neither 0 nor 1", f"turn {i} has {weight!r}")
    return float(weight)


def sharegpt_messages(value: Any, system: Any = None) -> tuple[Message, ...]:
    """ShareGPT turns ({"from", "value"}); a function_call turn becomes an assistant's tool call."""
    if not isinstance(value, list):
        raise Bad("conversations is not a list", f"it is {json_type(value)}")
    if not value:
        raise Bad("conversations is empty")
    turns = [sharegpt_message(turn, i) for i, turn in enumerate(value)]
    return (Message("system", system), *turns) if isinstance(system, str) and system else tuple(turns)


def sharegpt_message(turn: Any, i: int) -> Message:
    if not isinstance(turn, dict):
        raise Bad("turn is not an object", f"turn {i} is {json_type(turn)}")
    if "from" not in turn:
        raise Bad("missing role", f"turn {i} has no 'from'")
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise Bad("unknown role", f"turn {i} is from {turn['from']!r}, expected human, gpt, system ...")
    if "value" not in turn:
        raise Bad("missing content", f"turn {i} has no 'value'")
    text = turn["value"]
    if not isinstance(text, str):
        raise Bad("content has the wrong type", f"turn {i}: value is {json_type(text)}, expected a string")
    if role == "function_call":
        calls = parse_json(text, f"turn {i}: function_call")
        calls = calls if isinstance(calls, list) else [calls]
        return Message("assistant", None, tuple(_tool_call(c, i) for c in calls), weight=_weight(turn, i))
    return Message(role, text, weight=_weight(turn, i))


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools on offer: a list of objects, or the same as a JSON string."""
    if value is None or value == "":
        return ()
    tools = parse_json(value, "tools") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise Bad("tools is not a list of objects", f"it is {json_type(tools)}")
    _need_json(tools, "tools")
    return tuple(tools)


def history_messages(value: Any) -> list[Message]:
    """Alpaca's history: [question, answer] pairs."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Bad("history is not a list", f"it is {json_type(value)}")
    out: list[Message] = []
    for i, pair in enumerate(value):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise Bad("history pair has the wrong form", f"pair {i}: expected [question, answer]")
        out += [Message("user", pair[0]), Message("assistant", pair[1])]
    return out


_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_turns(messages: Sequence[Message]) -> None:
    """Raises Bad where the order of turns breaks the rules above, or an assistant says nothing."""
    before: str | None = None
    for i, message in enumerate(messages):
        role = message.role
        if role not in _FOLLOWS[before]:
            if role == before:
                raise Bad("same role twice in a row", f"turns {i - 1} and {i} are both {role}")
            if role == "system":
                raise Bad("system turn is not first", f"turn {i}")
            raise Bad("turns out of order", f"turn {i} is {role} after {before or 'nothing'}")
        if role == "assistant" and not message_text(message).strip():
            raise Bad("empty assistant", f"turn {i} says nothing")
        before = role


def check_conversation(messages: Sequence[Message]) -> None:
    roles = {m.role for m in messages}
    if roles == {"system"}:
        raise Bad("only a system turn")
    check_turns(messages)
    if "assistant" not in roles:
        raise Bad("no assistant turn", "nothing could be trained")


def check_prompt(messages: Sequence[Message]) -> None:
    if {m.role for m in messages} == {"system"}:
        raise Bad("only a system turn")
    check_turns(messages)
    if messages[-1].role == "assistant":
        raise Bad("prompt ends with an assistant turn", "what is to be answered must come last")


def as_prompt(value: Any, key: str = "prompt") -> tuple[Message, ...]:
    """A prompt given as text (one user turn) or as messages."""
    if isinstance(value, str):
        return (Message("user", value),)
    messages = messages_of(value, key)
    check_prompt(messages)
    return messages


def answer_text(messages: Iterable[Message]) -> str:
    """The one assistant turn that a completion consists of."""
    turns = list(messages)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise Bad("completion is not one assistant turn", f"it has {[m.role for m in turns]}")
    return message_text(turns[0])
