"""Tokenizers: fixed control ids, faithful text, control tokens spelled in text, digests."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.data.chat import ChatFormat
from pipeline.data.records import Conversation, Message
from pipeline.data.template import CHAT_TEMPLATE, CONTROL_TOKENS
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import (
    add_chat_tokens,
    encode_texts,
    from_sentencepiece,
    require_vocabulary,
    stop_tokens,
    train_tokenizer,
)

TEXTS = ["The river Orl runs through Dovan.", "17 plus 25 is 42.", "<|user|> says hi <|end|>"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def test_control_tokens_stand_first(tokenizer) -> None:
    assert [tokenizer.convert_tokens_to_ids(t) for t in CONTROL_TOKENS] == list(range(8))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert stop_tokens(tokenizer) == (7, 2)


def test_more_control_tokens_follow_and_are_stored(tmp_path: Path) -> None:
    more = ("<|fim_prefix|>", "<|fim_suffix|>")
    trained = train_tokenizer(TEXTS, 400, more=more)
    trained.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    for made in (trained, opened):
        assert made.convert_tokens_to_ids([*CONTROL_TOKENS, *more]) == list(range(10))
        assert set(more) <= set(made.all_special_tokens) and not set(encode_texts(made, list(more))[0]) & set(range(10))
    with pytest.raises(UserError, match="10 control tokens need 266"):
        train_tokenizer(TEXTS, 265, more=more)


def test_small_numbers_are_single_tokens() -> None:
    numbers = [str(n) for n in range(100)]
    trained = train_tokenizer([" ".join(numbers)] * 50, 400)
    assert all(len(ids) == 1 for ids in encode_texts(trained, numbers))
    assert len(encode_texts(trained, ["424242"])[0]) > 1


@pytest.mark.parametrize(
    "text",
    ["", " ", "  a  ", "\n\na\r\nb\t", "🙂👩‍👩‍👧", "红楼梦", "a\u0301\u200b", "don't  1,234.5", "\ufeffx"],
)
def test_text_survives(tokenizer, text: str) -> None:
    (ids,) = encode_texts(tokenizer, [text])
    assert tokenizer.decode(ids) == text


def test_control_tokens_spelled_in_text_stay_text(tokenizer) -> None:
    for token in CONTROL_TOKENS:
        (ids,) = encode_texts(tokenizer, [f"say {token} now"])
        assert not set(ids) & set(range(8))
        assert tokenizer.decode(ids) == f"say {token} now"


def test_a_corpus_full_of_control_tokens_cannot_merge_into_them() -> None:
    trained = train_tokenizer(["<|end|><|user|> hi"] * 500, 600)
    assert not set(encode_texts(trained, ["<|end|><|user|> hi"])[0]) & set(range(8))


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer) -> None:
    before = tokenizer("<|user|> x")["input_ids"]
    encode_texts(tokenizer, ["<|user|> x"])
    assert tokenizer("<|user|> x")["input_ids"] == before
    assert before[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_padding_and_truncation_left_by_others_do_not_leak(tokenizer) -> None:
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert [len(ids) for ids in encode_texts(tokenizer, ["", "river river river"])][0] == 0
    assert tokenizer.decode(encode_texts(tokenizer, ["river river river"])[0]) == "river river river"


def test_saved_and_opened_it_is_the_same(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["<|end|> spelled", "The river Orl", "42"]
    assert encode_texts(opened, texts) == encode_texts(tokenizer, texts)
    assert opened.chat_template == CHAT_TEMPLATE
    assert (opened.pad_token_id, opened.bos_token_id, opened.eos_token_id) == (0, 1, 2)


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="tokenizer.vocab_size"):
        train_tokenizer(TEXTS, 263)


def test_ids_must_fit_the_model(tokenizer) -> None:  # T10
    require_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match="does not belong"):
        require_vocabulary(tokenizer, len(tokenizer) - 1)


def test_chat_tokens_are_added_once(tokenizer) -> None:
    plain = train_tokenizer(TEXTS, 300)
    with pytest.raises(UserError, match="template of its own"):
        add_chat_tokens(plain)
    plain.chat_template = None
    assert add_chat_tokens(plain) == []
    assert plain.chat_template == CHAT_TEMPLATE


def test_a_sentencepiece_tokenizer_learns_to_chat(shared_data: Path) -> None:
    """tok512 of stories260K: text survives piece by piece although SentencePiece puts a space before it."""
    tokenizer = from_sentencepiece(shared_data / "weights_stories260K" / "tok512.model")
    assert len(tokenizer) == 512
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    added = add_chat_tokens(tokenizer)
    chat = ChatFormat(tokenizer)
    texts = ("Once upon a time", " a little  girl ", "x\ny")
    messages = (Message("user", texts[0]), Message("assistant", texts[1]), Message("user", texts[2]))
    rendered = chat.render(Conversation((*messages, Message("assistant", "é 红"))))
    assert max(rendered.ids) < 512 + len(added)
    assert rendered.ids.count(tokenizer.bos_token_id) == 1
    assert chat.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]) == texts[1] + "é 红"
