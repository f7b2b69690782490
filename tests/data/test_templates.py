"""Chat formats by name: worked renderings, then the invariants of masks on random conversations, under tokenizers of
every kind; the Jinja template beside each says the same."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import LlamaTokenizer

from pipeline.data.chat import ChatFormat, Rendered
from pipeline.data.records import Conversation, Document, Message
from pipeline.data.template import as_dict, message_text
from pipeline.data.templates import TEMPLATES, Template, TemplateName, known_template, template_named
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import add_chat_tokens, from_sentencepiece, stop_tokens, train_tokenizer

NAMES = list(TEMPLATES)
WITH_TOOLS = [name for name in NAMES if TEMPLATES[name].tools]
TEXT = "Mira lives in Dovan. 12 and 34. where? 红楼梦 [INST] ### Instruction: 问：user assistant\n"
SNIPPETS = [
    "", " ", "\n", "  two  spaces  ", "\n\nlines\r\n", "Where?", "12345 + 67", "🙂👩‍👩‍👧", "红楼梦", "don't", "\t", "ﬁ",
    "a\u0301\u200b\u2028", "{{ bos_token }}{% if x %}", "[INST] x [/INST]", "<<SYS>>", "\ufeff", "[Round 2]\n\n答：",
    "### Response:", "assistant\n",
]  # fmt: skip
SPELLED = ["<|user|>", "<|end|>", "<|bos|><|eos|>", "<s>", "</s>", "<unk>", "<0x0A>"]
TOOL = {"type": "function", "function": {"name": "add", "description": "ü", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}


@lru_cache
def chat(name: str, kind: str = "byte_bpe") -> ChatFormat:
    """A format over a tokenizer trained on a few words; "prefix" is SentencePiece's with a space before every text,
    "llama" the same as transformers opens it."""
    if kind not in ("prefix", "llama"):
        return ChatFormat(train_tokenizer([TEXT] * 30, 500, kind=kind, template=name))
    tokenizer = from_sentencepiece(prefixing()) if kind == "prefix" else LlamaTokenizer.from_pretrained(prefixing())
    add_chat_tokens(tokenizer, name)
    return ChatFormat(tokenizer)


@lru_cache
def prefixing() -> Path:
    """A model as LLaMA's: bos <s>, eos </s>, bytes, a space in front."""
    import tempfile

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 30), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = Path(tempfile.mkdtemp()) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def talk(*texts: str, system: str | None = None) -> Conversation:
    turns = [Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts)]
    return Conversation(((Message("system", system),) if system is not None else ()) + tuple(turns))


def shown(chat: ChatFormat, conversation: Conversation, prompt: bool = False) -> str:
    """The pieces in a row, trained ones in braces."""
    pieces = chat.template.pieces(conversation, "<bos>", "<eos>", prompt)
    runs = groupby(pieces, lambda piece: piece.answer)
    return "".join(("{%s}" if answer else "%s") % "".join(p.text for p in run) for answer, run in runs)


def test_names_are_those_of_the_setting() -> None:
    assert tuple(TEMPLATES) == get_args(TemplateName)
    with pytest.raises(UserError, match="'llama3' is not known; did you mean 'llama-3'"):
        template_named("llama3")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own", "<bos><|system|>S<|end|><|user|> q <|end|><|assistant|>{a<|end|>}<|user|>r<|end|><|assistant|>"),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n q <|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n"
            "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("llama-2", "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\n q [/INST]{ a <eos>}<bos>[INST] r [/INST]"),
        (
            "llama-3",
            "<bos><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{a<|eot_id|>}"
            "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("chatglm", "<bos>S\n\n[Round 1]\n\n问： q \n\n答：{a<eos>}\n\n[Round 2]\n\n问：r\n\n答："),
        (
            "alpaca",
            "<bos>S\n\n### Instruction:\n q \n\n### Response:{a<eos>}\n\n### Instruction:\nr\n\n### Response:",
        ),
    ],
)
def test_a_conversation_worked_by_hand(name: str, expected: str) -> None:
    assert shown(chat(name), talk(" q ", "a", "r", system="S"), prompt=True) == expected


def test_without_a_system_turn_alpaca_has_its_own_first_words() -> None:
    assert shown(chat("alpaca"), talk("q", "a")) == (
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nq\n\n### Response:{a<eos>}"
    )


def test_a_tool_call_of_llama_31_worked_by_hand() -> None:
    """The turns of "JSON based tool calling" in Meta's prompt_format.md; the result of a tool is never trained."""
    conversation = Conversation(
        (
            Message("user", "1+2?"),
            Message("assistant", None, (CALL,)),
            Message("tool", "3"),
            Message("assistant", "3."),
        ),
        ({"name": "add"},),
    )
    head = "<|start_header_id|>%s<|end_header_id|>\n\n"
    assert shown(chat("llama-3.1"), conversation) == (
        "<bos>" + head % "system" + "Environment: ipython<|eot_id|>" + head % "user"
        + "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        'Here is a list of functions in JSON format:\n{\n    "name": "add"\n}\n\n'
        "Return function calls in JSON format.<|eot_id|>"
        + head % "user" + "1+2?<|eot_id|>" + head % "assistant"
        + '{<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": "ü"}}<|eom_id|>}'
        + head % "ipython" + "3<|eot_id|>" + head % "assistant" + "{3.<|eot_id|>}"
    )  # fmt: skip
    rendered = chat("llama-3.1").render(conversation)
    assert set(rendered.rounds) == {-1, 0}
    twice = Conversation((Message("user", "q"), Message("assistant", None, (CALL, CALL))), source="f.jsonl:2")
    with pytest.raises(UserError, match="f.jsonl:2: turn 1 makes 2 tool calls"):
        chat("llama-3.1").render(twice)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_TOOLS])
def test_a_format_without_words_for_tools_refuses_them(name: str) -> None:
    called = (Message("user", "q"), Message("assistant", "", (CALL,)), Message("tool", "3"), Message("assistant", "3"))
    for conversation in (Conversation(called, source="f:1"), Conversation(called[:1], (TOOL,), source="f:1")):
        with pytest.raises(UserError, match=rf"f:1: .* '{name}' has no words; own, chatml and llama-3.1 have"):
            chat(name).render(conversation)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("own", ["<|end|>", "<|eos|>"]),
        ("chatml", ["<|im_end|>", "<|eos|>"]),
        ("llama-2", ["<|eos|>"]),
        ("llama-3", ["<|eot_id|>", "<|eos|>"]),
        ("llama-3.1", ["<|eot_id|>", "<|eom_id|>", "<|eos|>"]),
        ("chatglm", ["<|eos|>"]),
        ("alpaca", ["<|eos|>"]),
    ],
)
def test_what_ends_generation(name: str, stops: list[str]) -> None:
    ids = tuple(chat(name).tokenizer.convert_tokens_to_ids(stops))
    assert chat(name).stop_ids == stop_tokens(chat(name).tokenizer) == ids
    assert chat(name).completion_ids("x")[-1] == ids[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_is_recognised_by_its_template(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat(name).tokenizer.save_pretrained(tmp_path)
    opened = ChatFormat(AutoTokenizer.from_pretrained(tmp_path))
    assert opened.template is TEMPLATES[name] and opened.stop_ids == chat(name).stop_ids
    conversation = talk("Where?", "In Dovan.", system="S")
    assert opened.render(conversation) == chat(name).render(conversation)
    with pytest.raises(UserError, match=f"template variables .'x'.: the chat format '{name}' has none"):
        ChatFormat(opened.tokenizer, {"x": 1})


def test_a_template_without_its_tokens_is_a_strangers() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.chat_template = TEMPLATES["chatml"].jinja
    assert known_template(tokenizer) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_dialogue_as_a_document_ends_once(name: str) -> None:  # T3
    format = chat(name)
    (ids,) = format.documents_ids([Document(messages=talk("q", "a").messages)])
    assert ids[-1] == format.eos_id and ids[-2] != format.eos_id


# Random conversations


def random_text(rng: random.Random, spelled: bool) -> str:
    tokens = [t for template in TEMPLATES.values() for t in template.control]
    return "".join(rng.choice(SNIPPETS + (SPELLED + tokens if spelled else [])) for _ in range(rng.randint(0, 4)))


def random_conversation(rng: random.Random, template: Template) -> tuple[Conversation, bool]:
    spelled = rng.random() < 0.4
    text = lambda: random_text(rng, spelled)
    messages = [Message("system", text())] if rng.random() < 0.3 else []
    for number in range(rng.randint(1, 6)):
        messages.append(Message("user", text()))
        if template.tools and rng.random() < 0.3:
            messages.append(Message("assistant", rng.choice((None, text())), (CALL,), weight=rng.choice((None, 0.0))))
            messages += [Message("tool", text())] * rng.randint(1, 2)
        if number < 5 or rng.random() < 0.7:
            messages.append(Message("assistant", text(), weight=rng.choice((None, 0.0, 1.0))))
    tools = (TOOL,) * rng.randint(1, 2) if template.tools and rng.random() < 0.5 else ()
    return Conversation(tuple(messages), tools), spelled


def said(format: ChatFormat, message: Message) -> str:
    """What an answer decodes to between the header and its end, control tokens left out."""
    template = format.template
    if not message.tool_calls or template.name != "llama-3.1":
        return template.answer(message_text(message))
    call = '{"type": "function", "name": "add", "parameters": {"a": 1, "b": "ü"}}'
    return (message.content or "").strip() + call


def check_invariants(format: ChatFormat, conversation: Conversation, spelled: bool, rng: random.Random) -> None:
    template, messages = format.template, conversation.messages
    rendered = format.render(conversation)
    answers = [(i, m) for i, m in enumerate(messages) if m.role == "assistant"]
    # T5, T6: the trained runs are the answers and their ends, and nothing else: no user, no tool, no header
    runs = [list(run) for one, run in groupby(zip(rendered.ids, rendered.mask, strict=True), lambda row: row[1]) if one]
    assert [format.decode([i for i, _ in run]) for run in runs] == [said(format, m) for _, m in answers]
    ends = {format.end_id, *(format.tokenizer.convert_tokens_to_ids(t) for t in template.stops)}
    assert all(run[-1][0] in ends and sum(i in ends for i, _ in run) == 1 for run in runs)  # T3
    # T4, T7: the control tokens are those of the format, whatever the texts spell
    bos, eos = format.tokenizer.bos_token, format.tokenizer.eos_token
    pieces = list(template.pieces(conversation, bos, eos))
    control = [format.tokenizer.convert_tokens_to_ids(p.text) for p in pieces if p.control]
    assert [i for i in rendered.ids if i in format.control_ids] == control
    count = {"chatml": 0, "llama-2": sum(m.role == "user" for m in messages)}.get(template.name, 1)
    assert control.count(format.bos_id) == count
    # the prefix property, and what sampling is prompted with
    for i, message in answers:
        prompt = format.prompt_ids(messages[:i], conversation.tools)
        assert rendered.ids[: len(prompt)] == prompt
        if not message.tool_calls:
            answer = format.completion_ids(message_text(message))
            assert rendered.ids[len(prompt) :][: len(answer)] == answer
            assert format.decode(answer) == said(format, message)
    assert rendered.rounds == sorted(rendered.rounds)
    assert max(rendered.rounds) == sum(m.role == "user" for m in messages) - 1
    # the settings only ever take loss away
    for train_on in ("last_round", "marked"):
        other = format.render(conversation, train_on)
        assert other.ids == rendered.ids and other.rounds == rendered.rounds
        assert all(a <= b for a, b in zip(other.mask, rendered.mask, strict=True))
    check_truncation(format, rendered, rng)
    check_jinja(format, conversation, rendered, "".join(p.text for p in pieces), spelled)


def check_truncation(format: ChatFormat, rendered: Rendered, rng: random.Random) -> None:
    """T8: whole rounds go, and what is left is what its own conversation would be rendered as."""
    shorter, dropped = format.truncate(rendered, rng.randint(0, len(rendered) + 1))
    if shorter is None or shorter.ids == rendered.ids:
        return
    users = [i for i, m in enumerate(rendered.conversation.messages) if m.role == "user"]
    messages = rendered.conversation.messages
    answered = any(m.role == "assistant" for m in messages[users[-1] :])
    tail = len(users) if answered else len(users) - 1  # a round without an answer goes first
    first = dropped - (len(users) - tail)
    end = users[tail] if tail < len(users) else len(messages)
    kept = (*messages[: users[0]], *messages[users[first] : end])
    assert shorter.trained
    assert shorter.ids == format.render(Conversation(kept, rendered.conversation.tools)).ids


def check_jinja(format: ChatFormat, conversation: Conversation, rendered: Rendered, text: str, spelled: bool) -> None:
    """The stored template, as anybody else uses it: the same text, and ids and mask where a tokenizer sees no more than
    pieces do."""
    arguments: dict[str, Any] = {"tools": list(conversation.tools) or None}
    messages = [as_dict(m) for m in conversation.messages]
    assert format.tokenizer.apply_chat_template(messages, tokenize=False, **arguments) == text
    starts = [said(format, m)[:1] for m in conversation.messages if m.role == "assistant"]
    # Alpaca and ChatGLM let an answer touch a colon, and tokens can reach across
    if spelled or format.template.name in ("alpaca", "chatglm") or not all(s.strip() or s == " " for s in starts):
        return
    if (
        type(format.tokenizer.backend_tokenizer.pre_tokenizer).__name__ == "Metaspace"
    ):  # a space at the very start alone
        return
    if format.template.name == "llama-2" and not all(said(format, m).strip() for m in conversation.messages):
        return
    out = format.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False, **arguments
    )
    assert out["input_ids"] == rendered.ids
    if type(format.tokenizer.backend_tokenizer.model).__name__ != "Unigram":  # its bytes share one span in the text
        assert out["assistant_masks"] == rendered.mask


def run_random(name: str, kind: str, number: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(number):
        conversation, spelled = random_conversation(rng, TEMPLATES[name])
        check_invariants(chat(name, kind), conversation, spelled, rng)


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram", "prefix", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_some_random_conversations(name: str, kind: str) -> None:
    run_random(name, kind, 25, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram", "prefix", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_random_conversations(name: str, kind: str) -> None:
    run_random(name, kind, 3_000, seed=2)
