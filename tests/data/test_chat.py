"""Ids, mask and rounds: worked by hand, then on random conversations; the traps T2 to T8 of labels and
truncation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.chat import ChatFormat, NothingToTrain, Rendered, fit_pair, require_trained
from pipeline.data.records import Conversation, Document, Message
from pipeline.data.template import CONTROL_TOKENS, as_dict, message_text
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import train_tokenizer

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, TOOL, END = range(8)
SNIPPETS = [
    "", " ", "\n", "  two  spaces  ", "\n\nlines\r\n", "Where?", "12345 + 67", "🙂👩‍👩‍👧", "红楼梦",
    "a\u0301\u200b\u2028", "{{ bos_token }}{% if x %}", "don't", "\t", "ﬁ", "[INST] x [/INST]", "\ufeff",
]  # fmt: skip
SPELLED = ["<|user|>", "<|assistant|> x", "<|end|>", "<|bos|><|eos|>", "<|assistant|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(train_tokenizer(["Mira lives in Dovan. 12 and 34. <|user|> where?"] * 30, 500))


def talk(*texts: str, system: str | None = None) -> Conversation:
    """User and assistant texts in turn."""
    turns = [Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts)]
    return Conversation(((Message("system", system),) if system is not None else ()) + tuple(turns))


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return chat.completion_ids(text, finished=False)


def trained_ids(rendered: Rendered) -> list[int]:
    return [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]


def test_a_conversation_worked_by_hand(chat: ChatFormat) -> None:
    s, q, a = (ids_of(chat, t) for t in ("Be brief.", "Hi", "Hello."))
    rendered = chat.render(talk("Hi", "Hello.", system="Be brief."))
    assert rendered.ids == [BOS, SYSTEM, *s, END, USER, *q, END, ASSISTANT, *a, END]
    before = len(s) + len(q) + 6
    assert rendered.mask == [0] * before + [1] * (len(a) + 1)
    assert rendered.rounds == [-1] * (len(s) + 3) + [0] * (len(q) + len(a) + 4)


def test_rounds_and_what_is_trained_on(chat: ChatFormat) -> None:
    conversation = talk("a", "b", "c", "d")
    both = chat.render(conversation)
    last = chat.render(conversation, "last_round")
    assert trained_ids(both) == [*ids_of(chat, "b"), END, *ids_of(chat, "d"), END]
    assert trained_ids(last) == [*ids_of(chat, "d"), END]
    assert both.rounds == [-1] + [0] * 6 + [1] * 6
    first = replace(conversation.messages[3], weight=0.0)
    marked = Conversation((*conversation.messages[:3], first))
    assert trained_ids(chat.render(marked, "marked")) == [*ids_of(chat, "b"), END]
    assert trained_ids(chat.render(marked)) == trained_ids(both)  # marks count only under "marked"


def test_an_unknown_train_on_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(UserError, match="all_rounds, last_round, marked"):
        chat.render(talk("a", "b"), "everything")


def test_the_end_of_turn_is_trained_although_it_could_be_the_pad() -> None:  # T2
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.pad_token = "<|end|>"
    chat = ChatFormat(tokenizer)
    rendered = chat.render(talk("a", "b", "c", "d"))
    ends = [m for i, m in zip(rendered.ids, rendered.mask, strict=True) if i == tokenizer.pad_token_id]
    assert ends == [0, 1, 0, 1]


def test_the_last_round_is_the_last_answered_one(chat: ChatFormat) -> None:
    open_end = talk("a", "b", "c")
    assert trained_ids(chat.render(open_end, "last_round")) == [*ids_of(chat, "b"), END]


def test_nothing_is_trained_after_the_last_answer(chat: ChatFormat) -> None:  # T6
    rendered = chat.render(talk("a", "b", "still there?"))
    tail = len(ids_of(chat, "still there?")) + 2
    assert sum(rendered.mask[-tail:]) == 0
    assert trained_ids(rendered) == [*ids_of(chat, "b"), END]


@pytest.mark.parametrize("spelled", SPELLED)
def test_role_markers_in_a_users_text_train_nothing(chat: ChatFormat, spelled: str) -> None:  # T7
    rendered = chat.render(talk(f"{spelled} give me this", "no"))
    assert trained_ids(rendered) == [*ids_of(chat, "no"), END]
    assert [i for i in rendered.ids if i < len(CONTROL_TOKENS)] == [BOS, USER, END, ASSISTANT, END]


def test_nothing_to_train_names_the_line(chat: ChatFormat) -> None:
    conversation = Conversation((Message("user", "a"), Message("assistant", "b", weight=0)), source="x.jsonl:7")
    with pytest.raises(NothingToTrain, match="x.jsonl:7.*marked"):
        require_trained(chat.render(conversation, "marked"))


def test_tools_reasoning_and_results(chat: ChatFormat) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    tool = {"type": "function", "function": {"name": "add"}}
    thought = ({"type": "reasoning", "text": "hm"}, {"type": "text", "text": "So: "})
    conversation = Conversation(
        (
            Message("user", "1+2?"),
            Message("assistant", None, (call,)),
            Message("tool", "3 <|assistant|>"),
            Message("assistant", thought),
        ),
        (tool,),
    )
    rendered = chat.render(conversation)
    expected = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "ü"}}</tool_call>'
    assert trained_ids(rendered) == [
        *ids_of(chat, expected),
        END,
        *ids_of(chat, "<think>hm</think>So: "),
        END,
    ]
    assert chat.prompt_ids(conversation.messages[:1], conversation.tools) == rendered.ids[: rendered.mask.index(1)]
    with_system = Conversation((Message("system", "S."), *conversation.messages), (tool,))
    text = '<tools>{"type": "function", "function": {"name": "add"}}\n</tools>'
    assert chat.decode(chat.render(with_system).ids).startswith(f"S.{text}1+2?")
    for c in (conversation, with_system):
        assert _as_others_render(chat, c, spelled=True) == chat.decode(chat.render(c).ids)


def _as_others_render(chat: ChatFormat, c: Conversation, spelled: bool = False) -> object:
    """The stored template as transformers alone uses it: ids, or text without control tokens."""
    arguments = {"tools": list(c.tools) or None}
    messages = [as_dict(m) for m in c.messages]
    if not spelled:
        out = chat.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        return out["input_ids"], out["assistant_masks"]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    hidden = text.replace("3 <|assistant|>", "\0")
    for token in CONTROL_TOKENS:
        hidden = hidden.replace(token, "")
    return hidden.replace("\0", "3 <|assistant|>")


def test_documents(chat: ChatFormat) -> None:
    dialogue = Document(messages=talk("a", "b").messages)
    plain, spoken = chat.documents_ids([Document("Orl <|eos|>"), dialogue])
    assert plain == [BOS, *ids_of(chat, "Orl <|eos|>"), EOS]
    assert spoken == [*chat.render(talk("a", "b")).ids, EOS]


def test_answers_and_decoding(chat: ChatFormat) -> None:
    assert chat.completion_ids("b") == [*ids_of(chat, "b"), END]
    assert chat.completion_ids("b", finished=False) == ids_of(chat, "b")
    assert chat.stop_ids == (END, EOS)
    assert chat.decode(chat.completion_ids(" a <|end|> 红\n")) == " a <|end|> 红\n"
    assert chat.decode_all([[], [END], ids_of(chat, "x")]) == ["", "", "x"]


# Random conversations


def random_text(rng: random.Random, spelled: bool) -> str:
    pool = SNIPPETS + (SPELLED if spelled else [])
    return "".join(rng.choice(pool) for _ in range(rng.randint(0, 4)))


def random_conversation(rng: random.Random) -> tuple[Conversation, bool]:
    spelled = rng.random() < 0.4
    turns = rng.randint(1, 12)
    system = random_text(rng, spelled) if rng.random() < 0.3 else None
    conversation = talk(*(random_text(rng, spelled) for _ in range(turns)), system=system)
    marks = tuple(replace(m, weight=rng.choice((None, 0.0, 1.0))) for m in conversation.messages)
    texts = [message_text(m) for m in marks]
    return Conversation(marks), any(t in text for text in texts for t in CONTROL_TOKENS)


def check_invariants(chat: ChatFormat, conversation: Conversation, spelled: bool, rng: random.Random) -> None:
    messages = conversation.messages
    rendered = chat.render(conversation)
    answers = [message_text(m) for m in messages if m.role == "assistant"]
    # T5: what is trained decodes to exactly the answers and their ends
    everything = chat.tokenizer.decode(trained_ids(rendered), skip_special_tokens=False)
    assert everything == "".join(answer + "<|end|>" for answer in answers)
    # T3, T4: one bos, one end a turn, no eos; no control token comes from a text
    controls = [i for i in rendered.ids if i < 8]
    headers = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    assert controls == [BOS, *(i for m in messages for i in (headers[m.role], END))]
    # the prefix property, and what sampling is prompted with
    cut = rng.randrange(len(messages))
    before = chat.render(Conversation(messages[:cut])).ids
    assert rendered.ids[: len(before)] == before
    if messages[cut].role == "assistant":
        prompt = chat.prompt_ids(messages[:cut])
        assert prompt == [*before, ASSISTANT] == rendered.ids[: len(prompt)]
        assert rendered.ids[len(prompt) :][: len(chat.completion_ids(answer := message_text(messages[cut])))] == (
            chat.completion_ids(answer)
        )
    # T5: the stored template, as anybody else uses it, gives the same ids and the same mask
    if not spelled:
        ids, _ = _as_others_render(chat, conversation)
        assert ids == rendered.ids
    # the settings only ever take loss away
    for train_on in ("last_round", "marked"):
        other = chat.render(conversation, train_on)
        assert other.ids == rendered.ids and other.rounds == rendered.rounds
        assert all(a <= b for a, b in zip(other.mask, rendered.mask, strict=True))
    check_truncation(chat, rendered, rng)


def check_truncation(chat: ChatFormat, rendered: Rendered, rng: random.Random) -> None:
    limit = rng.randint(0, len(rendered) + 1)
    shorter, dropped = chat.truncate(rendered, limit)
    if shorter is None:
        return
    assert len(shorter) <= limit and shorter.trained
    left = sorted(set(shorter.rounds) - {-1})
    assert left == list(range(left[0], left[-1] + 1)), "whole neighbouring rounds"
    assert len(left) + dropped == max(rendered.rounds) + 1
    for number in (-1, *left):
        pick = lambda r, n=number: [x for x in zip(r.ids, r.mask, r.rounds, strict=True) if x[2] == n]
        assert pick(shorter) == pick(rendered)


def run_random(chat: ChatFormat, number: int, seed: int) -> None:
    rng = random.Random(seed)
    drawn = [random_conversation(rng) for _ in range(number)]
    for conversation, spelled in drawn:
        check_invariants(chat, conversation, spelled, rng)
    together = chat.render_all([c for c, _ in drawn])
    assert together[:50] == [chat.render(c) for c, _ in drawn[:50]]


def test_some_random_conversations(chat: ChatFormat) -> None:
    run_random(chat, 300, seed=1)


@pytest.mark.slow
def test_ten_thousand_random_conversations(chat: ChatFormat) -> None:
    run_random(chat, 10_000, seed=2)


@pytest.mark.parametrize("examples", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_turns_are_rendered_whole(chat: ChatFormat, examples: int) -> None:
    """Any text in any role: none makes a control token, none is lost, and nothing but answers is trained."""
    text = st.text(max_size=12) | st.sampled_from([*SNIPPETS, *SPELLED]) | st.none()
    parts = st.lists(
        st.builds(lambda kind, t: {"type": kind, "text": t}, st.sampled_from(["text", "reasoning"]), st.text())
    )
    calls = st.just(()) | st.builds(lambda t: ({"function": {"name": t, "arguments": {t: 1}}},), st.text(max_size=5))
    roles = ("system", "user", "assistant", "tool")
    turn = st.builds(
        lambda role, content, called: Message(role, content, tool_calls=called if role == "assistant" else ()),
        st.sampled_from(roles), text | parts.map(tuple), calls,
    )  # fmt: skip

    @settings(max_examples=examples, deadline=1000, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(turn, max_size=6), st.integers(0, 40))
    def check(turns: list[Message], limit: int) -> None:
        rendered = chat.render(Conversation(tuple(turns)))
        assert len(rendered.ids) == len(rendered.mask) == len(rendered.rounds)
        headers = dict(zip(roles, (SYSTEM, USER, ASSISTANT, TOOL), strict=True))
        controls = [i for i in rendered.ids if i < 8]
        assert controls == [BOS, *(i for m in turns for i in (headers[m.role], END))]
        answers = "".join(message_text(m) + "<|end|>" for m in turns if m.role == "assistant")
        assert chat.tokenizer.decode(trained_ids(rendered), skip_special_tokens=False) == answers
        before = chat.render(Conversation(tuple(turns[:-1]))).ids
        assert rendered.ids[: len(before)] == before
        shorter, _ = chat.truncate(rendered, limit)
        assert shorter is None or (len(shorter) <= limit and shorter.trained)

    check()


def test_the_templates_own_marks_agree_with_the_mask(chat: ChatFormat) -> None:
    conversation = talk("Where?", "Mira lives in Dovan.", "And 12?", "34.", system="S")
    assert _as_others_render(chat, conversation) == (
        (rendered := chat.render(conversation)).ids,
        rendered.mask,
    )


# Truncation


def test_every_length_trains_or_is_dropped(chat: ChatFormat) -> None:  # T8
    rendered = chat.render(talk("a", "b b b", "c", "d d", "e", "f", system="S"))
    for limit in range(2 * len(rendered)):
        shorter, dropped = chat.truncate(rendered, limit)
        assert (shorter is None and dropped == 3) or (shorter.trained > 0 and len(shorter) <= limit)
    assert chat.truncate(rendered, len(rendered)) == (rendered, 0)


def test_the_oldest_round_goes_first_and_the_system_turn_stays(chat: ChatFormat) -> None:
    rendered = chat.render(talk("a", "b", "c", "d", system="S"))
    shorter, dropped = chat.truncate(rendered, len(rendered) - 1)
    assert dropped == 1
    assert shorter.ids == chat.render(talk("c", "d", system="S")).ids
    assert set(shorter.rounds) == {-1, 1}


def test_an_unanswered_round_goes_before_any_other(chat: ChatFormat) -> None:
    rendered = chat.render(talk("a", "b", "c"))
    shorter, dropped = chat.truncate(rendered, len(rendered) - 1)
    assert (shorter.ids, dropped) == (chat.render(talk("a", "b")).ids, 1)


def test_prompts_lose_whole_rounds(chat: ChatFormat) -> None:
    messages = talk("a", "b", "c", system="S").messages
    short = chat.prompt_ids(talk("c", system="S").messages)
    assert chat.prompt_within(messages, len(short)) == (short, 1)
    assert chat.prompt_within(messages, 1000) == (chat.prompt_ids(messages), 0)
    assert chat.prompt_within(messages, len(short) - 1) == (None, 2)


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        (3000, 2000, (600, 400)),
        (2000, 3000, (400, 600)),
        (1000, 100, (900, 100)),
        (100, 1000, (100, 900)),
        (100, 500, (100, 500)),
        (500, 100, (500, 100)),
        (10, 10, (10, 10)),
    ],
)
def test_sharing_room_between_prompt_and_answer(prompt: int, answer: int, kept: tuple[int, int]) -> None:  # T8
    assert fit_pair(prompt, answer, 1000) == kept
