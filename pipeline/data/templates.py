"""Chat formats by name: what stands around the texts of a conversation, and the Jinja template that says the same.

    TEMPLATES["chatml"].pieces(conversation, bos="<s>", eos="</s>")

    <|im_start|>  user⏎Hi  <|im_end|>  ⏎  <|im_start|>  assistant⏎  Hello.  <|im_end|>  ⏎
      control      text     control  text   control        text     answer   answer   text

A piece is a control token or a run of text that is encoded by itself, so where an answer begins and ends is known, not
searched for, and no text can become a control token. The Jinja template is stored with a tokenizer for every other
tool; a test holds the two together, masks included. `known_template` recognises a tokenizer by it.

Sources, as read in 2026. own: template.py. chatml: openai-python's chatml.md; tool turns as LLaMA-Factory writes them
under that name. llama-2: chat_completion in meta-llama/llama. llama-3: ChatFormat in meta-llama/llama3. llama-3.1:
prompt_format.md ("JSON based tool calling") and chat_format.py in meta-llama/llama-models, without its lines of dates.
chatglm: build_prompt of ChatGLM2-6B's tokenizer. alpaca: PROMPT_DICT in tatsu-lab/stanford_alpaca, without input.
ChatGLM and Alpaca end only the last answer with eos, or have one round; here every answer ends with it, and rounds are
set apart by an empty line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pipeline.data.records import Conversation, Message
from pipeline.data.template import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END,
    HEADERS,
    TEXT_MACRO,
    TOOLS_MACRO,
    message_text,
    tools_text,
)
from pipeline.flow.config import nearest
from pipeline.flow.errors import UserError

TemplateName = Literal["own", "chatml", "llama-2", "llama-3", "llama-3.1", "chatglm", "alpaca"]


class Piece(NamedTuple):
    """text: one token where `control`. turn: the message that it belongs to, -1 before them all. answer: what an
    assistant says, and the token that ends it."""

    text: str
    turn: int
    control: bool = False
    answer: bool = False


# Of whole turns, with bos and eos, which are "" where a tokenizer has none.
LayOut = Callable[["Template", Conversation, str, str], Iterator[Piece]]


@dataclass(frozen=True)
class Template:
    """control: tokens that it needs beside bos and eos. end: what ends an answer, eos where None. stops: what else ends
    generation. header: the pieces that sampling is prompted with. lead, tail: text around an answer, which is trained.
    trims: texts lose the white space around them. tools: it has words for tool calls and their results.
    apart: a round is rendered alike wherever it stands."""

    name: str
    jinja: str
    lay_out: LayOut
    header: tuple[Piece, ...] = ()
    control: tuple[str, ...] = ()
    end: str | None = None
    stops: tuple[str, ...] = ()
    lead: str = ""
    tail: str = ""
    trims: bool = False
    tools: bool = False
    apart: bool = True

    def pieces(self, conversation: Conversation, bos: str, eos: str, prompt: bool = False) -> list[Piece]:
        """The turns, and with `prompt` the assistant's header behind them. UserError for what it has no words for."""
        if not self.tools:
            self._refuse_tools(conversation)
        turns = [piece for piece in self.lay_out(self, conversation, bos, eos) if piece.text]
        return [*turns, *self.header] if prompt else turns

    def answer(self, text: str) -> str:
        """The text as it stands between the assistant's header and the end token."""
        return self.lead + (text.strip() if self.trims else text) + self.tail

    def answer_follows_text(self, eos: str) -> bool:
        """Whether the last piece of a prompt is text, which the answer then continues."""
        return not self.pieces(Conversation((Message("user", "?"),)), "", eos, prompt=True)[-1].control

    def _refuse_tools(self, conversation: Conversation) -> None:
        turn = next((i for i, m in enumerate(conversation.messages) if m.tool_calls or m.role == "tool"), None)
        if conversation.tools or turn is not None:
            where = conversation.source or "a conversation"
            raise UserError(
                f"{where}: {'it offers tools' if turn is None else f'turn {turn} is about a tool'}, for which the chat "
                f"format {self.name!r} has no words; own, chatml and llama-3.1 have"
            )


def template_named(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"chat format {name!r} is not known{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def known_template(tokenizer: Any) -> Template | None:
    """The format whose Jinja template this tokenizer carries, where it has all of its tokens."""
    found = next((t for t in TEMPLATES.values() if t.jinja == tokenizer.chat_template), None)
    if found is None or (found.end is None and tokenizer.eos_token is None):
        return None
    vocabulary = tokenizer.get_vocab()
    return found if all(token in vocabulary for token in found.control) else None


# ----------------------------------------------------------------------------------- formats with a header to each turn


def _turns(conversation: Conversation) -> list[tuple[int, str, str]]:
    """(turn, role, text) of each message; the tools end the system turn, or make one, which then comes first."""
    turns = [(i, m.role, message_text(m)) for i, m in enumerate(conversation.messages)]
    tools = tools_text(conversation.tools)
    if not tools:
        return turns
    if turns and turns[0][1] == "system":
        return [(0, "system", turns[0][2] + tools), *turns[1:]]
    return [(-1, "system", tools), *turns]


def _own(template: Template, conversation: Conversation, bos: str, eos: str) -> Iterator[Piece]:
    yield Piece(bos, -1, True)
    for turn, role, text in _turns(conversation):
        answer = role == "assistant"
        yield Piece(HEADERS[role], turn, True)
        yield Piece(text, turn, False, answer)
        yield Piece(END, turn, True, answer)


IM_START, IM_END = "<|im_start|>", "<|im_end|>"


def _chatml(template: Template, conversation: Conversation, bos: str, eos: str) -> Iterator[Piece]:
    for turn, role, text in _turns(conversation):
        yield Piece(IM_START, turn, True)
        yield from _spoken(turn, role, f"{role}\n", text)
        yield Piece(IM_END, turn, True, role == "assistant")
        yield Piece("\n", turn)


def _spoken(turn: int, role: str, lead: str, text: str) -> Iterator[Piece]:
    """Where no control token stands between a header and an answer, the answer is a piece of its own."""
    if role == "assistant":
        yield Piece(lead, turn)
        yield Piece(text, turn, False, True)
    else:
        yield Piece(lead + text, turn)


START_HEADER, END_HEADER, EOT, EOM = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"
PYTHON_TAG = "<|python_tag|>"
_ENVIRONMENT = "Environment: ipython"
_OFFER = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
_RETURN = "\n\nReturn function calls in JSON format."


def _llama3_header(turn: int, role: str) -> Iterator[Piece]:
    yield Piece(START_HEADER, turn, True)
    yield Piece(role, turn)
    yield Piece(END_HEADER, turn, True)


def _llama3_turn(turn: int, role: str, text: str) -> Iterator[Piece]:
    yield from _llama3_header(turn, role)
    yield from _spoken(turn, role, "\n\n", text.strip())
    yield Piece(EOT, turn, True, role == "assistant")


def _llama3(template: Template, conversation: Conversation, bos: str, eos: str) -> Iterator[Piece]:
    yield Piece(bos, -1, True)
    for turn, message in enumerate(conversation.messages):
        yield from _llama3_turn(turn, message.role, message_text(message))


def _llama31(template: Template, conversation: Conversation, bos: str, eos: str) -> Iterator[Piece]:
    """Tools are offered by a turn before the first; a call ends with <|eom_id|>, and its result is said by ipython."""
    yield Piece(bos, -1, True)
    messages = list(enumerate(conversation.messages))
    if conversation.tools:
        turn, system = -1, ""
        if messages and messages[0][1].role == "system":
            turn, system = 0, message_text(messages.pop(0)[1]).strip()
        yield from _llama3_turn(turn, "system", _ENVIRONMENT + (f"\n\n{system}" if system else ""))
        offered = "\n\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in conversation.tools)
        yield from _llama3_turn(-1, "user", _OFFER + offered + _RETURN)
    for turn, message in messages:
        if not message.tool_calls:
            yield from _llama3_turn(turn, "ipython" if message.role == "tool" else message.role, message_text(message))
            continue
        yield from _llama3_header(turn, message.role)
        said = message_text(replace(message, tool_calls=()))
        yield from _spoken(turn, message.role, "\n\n", said.strip())
        yield Piece(PYTHON_TAG, turn, True, True)
        yield Piece(_one_call(conversation, turn), turn, False, True)
        yield Piece(EOM, turn, True, True)


def _one_call(conversation: Conversation, turn: int) -> str:
    calls = conversation.messages[turn].tool_calls
    if len(calls) > 1:
        where = conversation.source or "a conversation"
        raise UserError(f"{where}: turn {turn} makes {len(calls)} tool calls, and 'llama-3.1' holds one a turn")
    call = calls[0].get("function", calls[0])
    said = {"type": "function", "name": call["name"], "parameters": call.get("arguments", {})}
    return json.dumps(said, ensure_ascii=False)


# ----------------------------------------------------------------------------- formats of rounds: a question, an answer


def _rounds(ask: Callable[[str, str, int], str], every: bool = False) -> LayOut:
    """`ask(system, question, round)` is the text before an answer. every: bos at each round, not only at the first."""

    def lay_out(template: Template, conversation: Conversation, bos: str, eos: str) -> Iterator[Piece]:
        system, number = "", 0
        for turn, message in enumerate(conversation.messages):
            text = message_text(message)
            if message.role == "system":
                system += text
            elif message.role == "user":
                if every or not number:
                    yield Piece(bos, turn, True)
                yield Piece(ask(system, text, number), turn)
                system, number = "", number + 1
            else:
                yield Piece(template.answer(text), turn, False, True)
                yield Piece(eos, turn, True, True)
        if system:
            where = conversation.source or "a conversation"
            raise UserError(f"{where}: no user turn follows the system turn, which {template.name!r} writes into one")

    return lay_out


def _llama2_question(system: str, question: str, number: int) -> str:
    given = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {(given + question).strip()} [/INST]"


def _chatglm_question(system: str, question: str, number: int) -> str:
    before = "\n\n" if number else f"{system}\n\n" if system else ""
    return f"{before}[Round {number + 1}]\n\n问：{question}\n\n答："


_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def _alpaca_question(system: str, question: str, number: int) -> str:
    before = "" if number else system or _ALPACA
    return f"{before}\n\n### Instruction:\n{question}\n\n### Response:"


# ---------------------------------------------------------------------------------------------------- the same in Jinja


_TOOLS_FIRST = "{%- if tools and not (messages and messages[0]['role'] == 'system') -%}"
_EACH, _DONE = "{%- for m in messages -%}", "{%- endfor -%}"
_ASSISTANT = "{%- if m['role'] == 'assistant' -%}"
_CHATML_JINJA = (
    TEXT_MACRO + TOOLS_MACRO + _TOOLS_FIRST + "{{ '<|im_start|>system\\n' + toolbox() + '<|im_end|>\\n' }}{%- endif -%}"
    + _EACH + "{{ '<|im_start|>' + m['role'] + '\\n' }}" + _ASSISTANT
    + "{%- generation -%}{{ text(m) + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}"
    "{%- elif m['role'] == 'system' and loop.first and tools -%}{{ text(m) + toolbox() + '<|im_end|>\\n' }}"
    "{%- else -%}{{ text(m) + '<|im_end|>\\n' }}{%- endif -%}" + _DONE
    + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)  # fmt: skip
_LLAMA3_HEAD = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
_LLAMA3_PROMPT = (
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)
_LLAMA3_JINJA = (
    TEXT_MACRO + "{{- bos_token -}}" + _EACH + _LLAMA3_HEAD + _ASSISTANT
    + "{%- generation -%}{{ (text(m) | trim) + '<|eot_id|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ (text(m) | trim) + '<|eot_id|>' }}{%- endif -%}" + _DONE + _LLAMA3_PROMPT
)  # fmt: skip
_LLAMA31_JINJA = (
    TEXT_MACRO + "{%- macro turn(role, said) -%}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + (said | trim) + '<|eot_id|>' }}{%- endmacro -%}"
    "{{- bos_token -}}{%- set rest = messages -%}"
    "{%- if tools -%}"
    "{%- set said = '' -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set said = text(messages[0]) | trim -%}{%- set rest = messages[1:] -%}{%- endif -%}"
    "{{ turn('system', " + repr(_ENVIRONMENT) + " + ('\\n\\n' + said if said else '')) }}"
    "{%- set ns = namespace(offered='') -%}"
    "{%- for t in tools -%}"
    "{%- set ns.offered = ns.offered + ('' if loop.first else '\\n\\n') + (t | tojson(indent=4)) -%}"
    "{%- endfor -%}"
    "{{ turn('user', " + json.dumps(_OFFER) + " + ns.offered + " + repr(_RETURN) + ") }}"
    "{%- endif -%}"
    "{%- for m in rest -%}" + _ASSISTANT + _LLAMA3_HEAD
    + "{%- generation -%}"
    "{%- if m['tool_calls'] -%}"
    "{%- if m['tool_calls'] | length > 1 -%}{{ raise_exception('one tool call a turn') }}{%- endif -%}"
    "{%- set f = m['tool_calls'][0] -%}{%- if f['function'] is defined -%}{%- set f = f['function'] -%}{%- endif -%}"
    "{%- set call = {'type': 'function', 'name': f['name'], 'parameters': f['arguments']} -%}"
    "{{ text({'content': m['content'], 'tool_calls': []}) | trim }}"
    "{{ '<|python_tag|>' + (call | tojson) + '<|eom_id|>' }}"
    "{%- else -%}{{ (text(m) | trim) + '<|eot_id|>' }}{%- endif -%}"
    "{%- endgeneration -%}"
    "{%- else -%}{{ turn('ipython' if m['role'] == 'tool' else m['role'], text(m)) }}{%- endif -%}" + _DONE
    + _LLAMA3_PROMPT
)  # fmt: skip


def _rounds_jinja(bos: str, ask: str, answer: str) -> str:
    """`ask` with `given` (the system text), `asked` and `number`, from 0; `answer` with `said`."""
    return (
        TEXT_MACRO + "{%- set ns = namespace(system='', number=0) -%}" + _EACH
        + "{%- if m['role'] == 'system' -%}{%- set ns.system = ns.system + text(m) -%}"
        "{%- elif m['role'] == 'user' -%}"
        "{%- set given = ns.system -%}{%- set asked = text(m) -%}{%- set number = ns.number -%}"
        + bos + ask + "{%- set ns.system = '' -%}{%- set ns.number = ns.number + 1 -%}"
        "{%- else -%}{%- set said = text(m) -%}{%- generation -%}{{ " + answer + " + eos_token }}{%- endgeneration -%}"
        "{%- endif -%}" + _DONE
    )  # fmt: skip


_BOS_EACH, _BOS_ONCE = "{{- bos_token -}}", "{%- if not number -%}{{- bos_token -}}{%- endif -%}"
_LLAMA2_JINJA = _rounds_jinja(
    _BOS_EACH,
    "{{ '[INST] ' + (('<<SYS>>\\n' + given + '\\n<</SYS>>\\n\\n' if given else '') + asked) | trim + ' [/INST]' }}",
    "' ' + (said | trim) + ' '",
)
_CHATGLM_JINJA = _rounds_jinja(
    _BOS_ONCE,
    "{{ ('\\n\\n' if number else given + '\\n\\n' if given else '') + '[Round ' + (number + 1) | string"
    " + ']\\n\\n问：' + asked + '\\n\\n答：' }}",
    "said",
)
_ALPACA_JINJA = _rounds_jinja(
    _BOS_ONCE,
    "{{ ('' if number else given or " + repr(_ALPACA) + ") + '\\n\\n### Instruction:\\n' + asked"
    " + '\\n\\n### Response:' }}",
    "said",
)


# -------------------------------------------------------------------------------------------------------------- by name


def _header(*pieces: tuple[str, bool]) -> tuple[Piece, ...]:
    return tuple(Piece(text, -1, control) for text, control in pieces)


_LLAMA3_ASKS = _header((START_HEADER, True), ("assistant", False), (END_HEADER, True), ("\n\n", False))
_LLAMA3_TOKENS = (START_HEADER, END_HEADER, EOT)
_ALL: Sequence[Template] = (
    Template(
        "own", CHAT_TEMPLATE, _own, _header((HEADERS["assistant"], True)), CONTROL_TOKENS[3:], END, tools=True,
    ),
    Template(
        "chatml", _CHATML_JINJA, _chatml, _header((IM_START, True), ("assistant\n", False)), (IM_START, IM_END), IM_END,
        tools=True,
    ),
    Template(
        "llama-2", _LLAMA2_JINJA, _rounds(_llama2_question, every=True), lead=" ", tail=" ", trims=True, apart=False,
    ),
    Template("llama-3", _LLAMA3_JINJA, _llama3, _LLAMA3_ASKS, _LLAMA3_TOKENS, EOT, trims=True),
    Template(
        "llama-3.1", _LLAMA31_JINJA, _llama31, _LLAMA3_ASKS, (*_LLAMA3_TOKENS, EOM, PYTHON_TAG), EOT, stops=(EOM,),
        trims=True, tools=True,
    ),
    Template("chatglm", _CHATGLM_JINJA, _rounds(_chatglm_question), apart=False),
    Template("alpaca", _ALPACA_JINJA, _rounds(_alpaca_question), apart=False),
)  # fmt: skip
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
