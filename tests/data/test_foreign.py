"""Templates of other families: masks from prefixes and marks, the same invariants, or a refusal with its
reason."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from pipeline.data.chat import ChatFormat
from pipeline.data.foreign import TemplateRefused
from pipeline.data.records import Conversation, Message
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WRONGLY_MARKED = MARKED.replace(
    "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}",
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}{% endif %}",
)
HEADERS = (  # as Llama 3: a bos, trimmed texts
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|body|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\\n\\n' }}{% endif %}"
)
INST = (  # as Llama 2: the system text inside the first user turn, roles checked
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% if rest | length == 0 %}{{ raise_exception('no user turn') }}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # keeps only the last answer's text, as templates that drop earlier thoughts do
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% else %}{{ 'dropped' }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
TOKENS = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>"]


def chat_with(template: str, **variables: Any) -> ChatFormat:
    tokenizer = train_tokenizer(["Mira lives in Dovan. user assistant"] * 20, 400)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    return ChatFormat(tokenizer, variables)


def talk(*texts: str, system: str | None = None) -> Conversation:
    turns = tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(texts))
    return Conversation(((Message("system", system),) if system else ()) + turns, source="f.jsonl:3")


def trained_text(chat: ChatFormat, conversation: Conversation, train_on: str = "all_rounds") -> str:
    rendered = chat.render(conversation, train_on)
    ids = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (CHATML, " yo <|im_end|>", "b<|im_end|>"),
        (MARKED, " yo <|im_end|>", "b<|im_end|>"),
        (HEADERS, "yo<|eot|>", "b<|eot|>"),
        (INST, " yo <|eos|>", " b <|eos|>"),
    ],
)
def test_answers_and_their_ends_are_trained(template: str, first: str, second: str) -> None:
    chat = chat_with(template)
    conversation = talk("hi", " yo ", "and", "b", system="S")
    assert trained_text(chat, conversation) == first + second
    assert trained_text(chat, conversation, "last_round") == second
    rendered = chat.render(conversation)
    assert sorted(set(rendered.rounds) - {-1}) == [0, 1]
    assert rendered.rounds == sorted(rendered.rounds)
    prompt = chat.prompt_ids(conversation.messages[:-1])
    assert rendered.ids[: len(prompt)] == prompt
    assert rendered.ids[len(prompt) :][: len(chat.completion_ids("b"))] == chat.completion_ids("b")


@pytest.mark.parametrize("template", [CHATML, MARKED, HEADERS])
def test_random_conversations_keep_the_invariants(template: str) -> None:
    chat = chat_with(template)
    rng = random.Random(5)
    pool = ["a", " ", "\n", "红", "🙂", "12", "don't", "<|user|", ""]
    for _ in range(40):
        texts = ["".join(rng.choices(pool, k=rng.randint(1, 5))) + "x" for _ in range(2 * rng.randint(1, 4))]
        conversation = talk(*texts)
        end = chat.tokenizer.decode([chat.end_id])
        assert trained_text(chat, conversation) == "".join(
            (t.strip() if chat.foreign.trims else t) + end for t in texts[1::2]
        )


def test_one_bos() -> None:  # T4
    chat = chat_with(HEADERS)
    rendered = chat.render(talk("a", "b", "c", "d"))
    assert rendered.ids.count(chat.bos_id) == 1


def test_truncation_renders_again() -> None:
    chat = chat_with(INST)
    conversation = talk("a a a a", "b", "c", "d", system="S")
    rendered = chat.render(conversation)
    shorter, dropped = chat.truncate(rendered, len(rendered) - 1)
    assert dropped == 1
    assert shorter.ids == chat.render(talk("c", "d", system="S")).ids
    assert chat.truncate(rendered, 3) == (None, 2)


def test_answers_for_sampling_are_normalised_alike() -> None:
    chat = chat_with(HEADERS)
    rendered = chat.render(talk("a", "  b  "))
    prompt = chat.prompt_ids([Message("user", "a")])
    assert rendered.ids == prompt + chat.completion_ids("  b  ")


@pytest.mark.parametrize("clock", ["{{ strftime_now('%d %b %Y') }}", "{{ now() }}"])
def test_clocks_are_refused(clock: str) -> None:
    with pytest.raises(UserError, match="would have other ids tomorrow"):
        chat_with(clock + CHATML)


def test_template_variables_are_settings() -> None:
    chat = chat_with("{{ date }}" + CHATML, date="26 Jul 2024")
    assert chat.decode(chat.render(talk("a", "b")).ids).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("template", "conversation", "reason"),
    [
        (CHATML, talk("say <|im_end|>", "b"), "f.jsonl:3: turn 0 spells the control token '<|im_end|>'"),
        (
            FORGETFUL,
            talk("a", "b", "c", "d"),
            "f.jsonl:3: turn 1: the template renders the answer 'b' as 'dropped'",
        ),
        (WRONGLY_MARKED, talk("a", "b"), "f.jsonl:3: 1 answers, but 2 generation marks"),
        (INST, Conversation((Message("system", "S"),), source="f:1"), "no user turn"),
    ],
)
def test_what_cannot_be_masked_is_refused(template: str, conversation: Conversation, reason: str) -> None:
    chat = chat_with(template)
    with pytest.raises(TemplateRefused) as caught:
        chat.render(conversation)
    assert reason in str(caught.value)


def test_a_template_that_never_ends_an_answer_is_refused() -> None:
    with pytest.raises(UserError, match="never stop"):
        chat_with(ENDLESS)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        chat_with("")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
        "{{ f(50) }}",
    ],
)
def test_a_template_that_runs_on_is_ended(template: str) -> None:
    before = sys.gettrace()
    with pytest.raises(TemplateRefused, match="more than 1,000,000 lines of its program"):
        chat_with(template + CHATML)
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% import '../x' as x %}",
        "{% extends 'x' %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ messages + 5 }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% if %}",
        "{{ none.a.b }}",
        "{" * 100_000,
    ],
)
def test_a_template_is_a_program_that_may_fail_and_reaches_nothing(template: str) -> None:
    with pytest.raises(UserError) as error:
        chat_with(template).render(talk("a", "b"))
    assert "root:" not in str(error.value)
