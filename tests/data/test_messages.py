"""Turns of foreign formats to messages."""

from __future__ import annotations

from datetime import date

import pytest

from pipeline.data.lines import Bad
from pipeline.data.messages import check_prompt, messages_of, sharegpt_messages, tools_of
from pipeline.data.records import Message
from pipeline.data.template import message_text


def test_sharegpt_calls_and_results() -> None:
    turns = [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 1}"}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    messages = sharegpt_messages(turns, system="S")
    assert [m.role for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert message_text(messages[2]) == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def test_parts_weights_and_developer() -> None:
    messages = messages_of(
        [
            {"role": "developer", "content": [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "loss_weight": 1.0,
                "content": [
                    {"type": "reasoning", "value": "hm"},
                    {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
                ],
            },
        ]
    )
    assert messages[0] == Message("system", "ab")
    assert messages[1].weight == 1.0
    assert message_text(messages[1]) == '<think>hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'


def call(arguments: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight is neither 0 nor 1"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool call without a name"),
        ({"role": "assistant", "tool_calls": ["{"]}, "invalid JSON in a string"),
        ({"role": "assistant", "tool_calls": 3}, "tool_calls is not a list"),
        ({"role": "user", "content": ["x"]}, "unsupported part"),
        (call('{"a": "\\ud800"}'), "invalid JSON in a string: turn 0: arguments of f: lone surrogate"),
        (call('{"a": NaN}'), "invalid JSON in a string: turn 0: arguments of f: not a number"),
        (call('{"a": 1, "a": 2}'), "invalid JSON in a string: turn 0: arguments of f: duplicate key"),
        (call("[" * 65 + "]" * 65), "invalid JSON in a string: turn 0: arguments of f: nested too deeply"),
        (call("1" * 5000), "invalid JSON in a string: turn 0: arguments of f: Exceeds the limit"),
        (call({"a": date(2024, 5, 1)}), "not a JSON value: turn 0: arguments of f: Object of type date"),
        (call({"a": float("nan")}), "not a JSON value: turn 0: arguments of f: Out of range"),
    ],
)
def test_bad_turns(turn: dict[str, object], reason: str) -> None:
    with pytest.raises(Bad, match=reason):
        messages_of([turn])


def test_tools_as_text_or_objects() -> None:
    assert tools_of('[{"name": "f"}]') == ({"name": "f"},) == tools_of([{"name": "f"}])
    assert tools_of("[]") == () == tools_of(None)
    with pytest.raises(Bad, match="tools is not a list"):
        tools_of('{"name": "f"}')
    with pytest.raises(Bad, match="invalid JSON in a string: tools: not a number: Infinity is not JSON"):
        tools_of('[{"least": Infinity}]')
    with pytest.raises(Bad, match="not a JSON value: tools: Object of type date"):
        tools_of([{"since": date(2024, 5, 1)}])


def test_a_prompt_may_end_with_a_tools_result_but_not_an_answer() -> None:
    call = Message("assistant", None, ({"function": {"name": "f", "arguments": {}}},))
    check_prompt([Message("user", "a"), call, Message("tool", "r")])
    with pytest.raises(Bad, match="prompt ends with an assistant turn"):
        check_prompt([Message("user", "a"), Message("assistant", "b")])
