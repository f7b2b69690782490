"""The project's own chat format: control tokens, the Jinja template stored with a tokenizer, and text to ids.

    <|bos|><|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|>

Nothing stands between the pieces and no text is trimmed. A prompt ends with `<|assistant|>`; an answer ends
with `<|end|>`; a document is `<|bos|>text<|eos|>`. `message_text` and `CHAT_TEMPLATE` say the same thing
twice, once for this project and once for every other tool that opens the tokenizer; a test holds them
together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.records import Message

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, TOOL, END = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"
CONTROL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, TOOL, END)  # ids 0..7 of a tokenizer trained here
HEADERS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}

TEXT_MACRO = (
    "{%- macro text(m) -%}"
    "{%- if m['content'] is string -%}{{ m['content'] }}"
    "{%- elif m['content'] -%}"
    "{%- for p in m['content'] -%}"
    "{%- if p['type'] == 'text' -%}{{ p['text'] }}"
    "{%- elif p['type'] == 'reasoning' -%}{{ '<think>' + p['text'] + '</think>' }}"
    "{%- else -%}{{ p | tojson }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- for c in (m['tool_calls'] or []) -%}"
    "{{ '<tool_call>' + ((c['function'] if c['function'] is defined else c) | tojson) + '</tool_call>' }}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
)
TOOLS_MACRO = (
    "{%- macro toolbox() -%}{{ '<tools>' }}{%- for t in tools -%}{{ (t | tojson) + '\\n' }}{%- endfor -%}"
    "{{ '</tools>' }}{%- endmacro -%}"
)
CHAT_TEMPLATE = (
    TEXT_MACRO + TOOLS_MACRO + "{{- bos_token -}}"
    "{%- if tools and not (messages and messages[0]['role'] == 'system') -%}"
    "{{ '<|system|>' + toolbox() + '<|end|>' }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}{%- generation -%}{{ text(m) + '<|end|>' }}{%- endgeneration -%}"
    "{%- elif m['role'] == 'system' and loop.first and tools -%}"
    "{{ '<|system|>' + text(m) + toolbox() + '<|end|>' }}"
    "{%- else -%}{{ '<|' + m['role'] + '|>' + text(m) + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def message_text(message: Message) -> str:
    """The text of one turn: typed parts joined, reasoning in <think>, tool calls as JSON in <tool_call>."""
    if isinstance(message.content, str):
        if not message.tool_calls:
            return message.content
        pieces = [message.content]
    else:
        pieces = [_part_text(part) for part in message.content or ()]
    calls = (call.get("function", call) for call in message.tool_calls)
    return "".join(pieces) + "".join(f"<tool_call>{_json(call)}</tool_call>" for call in calls)


def _part_text(part: Mapping[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["text"])
    return f"<think>{part['text']}</think>" if part["type"] == "reasoning" else _json(part)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools on offer, one JSON object a line; it stands at the end of the system turn."""
    return "<tools>" + "".join(_json(tool) + "\n" for tool in tools) + "</tools>" if tools else ""


def as_dict(message: Message) -> dict[str, Any]:
    """The message as chat templates of transformers expect it."""
    content = message.content if isinstance(message.content, str) else [dict(p) for p in message.content or ()]
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        out["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.name is not None:
        out["name"] = message.name
    return out


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text by itself, without special tokens; control tokens spelled in a text stay text.

    Works on any fast tokenizer and leaves its settings as they were. Offsets are not computed, which makes it
    a few times faster than calling the tokenizer.
    """
    return encode_with(tokenizer.backend_tokenizer, texts)


def encode_with(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """The same by the tokenizer of the `tokenizers` library inside."""
    if not texts:
        return []
    before = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def without_prefix(backend: Any) -> Any:
    """The same tokenizer for text that continues other text, or `backend` itself where that makes no difference.

    SentencePiece puts a space before a text and takes it away when decoding. In the middle of a run that space would be
    a character that nobody wrote.
    """
    table = {name: _state(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    plain = {name: _unprefixed(step) for name, step in table.items()}
    if plain == table:
        return backend
    whole = {**json.loads(backend.to_str()), **plain}
    return type(backend).from_str(json.dumps(whole))


def _state(step: Any) -> Any:
    return None if step is None else json.loads(step.__getstate__())


def _unprefixed(step: Any) -> Any:
    """A step of `tokenizers`, as JSON, without what it does about a space in front."""
    if step is None or step["type"] in ("Prepend", "Strip") or (step["type"] == "Replace" and step["content"] == ""):
        return None
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if inner in step:
            return {**step, inner: [kept for s in step[inner] if (kept := _unprefixed(s)) is not None]}
    return {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
