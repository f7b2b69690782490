"""Tokenizers: fixed control ids, faithful text, control tokens spelled in text, digests; other projects' files."""

from __future__ import annotations

import base64
import gzip
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from pipeline.data.chat import ChatFormat
from pipeline.data.records import Conversation, Message
from pipeline.data.template import CHAT_TEMPLATE, CONTROL_TOKENS, encode_with, without_prefix
from pipeline.data.templates import TEMPLATES
from pipeline.flow.errors import UserError
from pipeline.llama.open import open_tokenizer
from pipeline.llama.tokenizer import (
    LLAMA3_TOKENS,
    add_chat_tokens,
    add_tokens,
    encode_texts,
    from_sentencepiece,
    from_tiktoken,
    open_pieces,
    require_vocabulary,
    smallest_vocabulary,
    stop_tokens,
    train_tokenizer,
)

TEXTS = ["The river Orl runs through Dovan.", "17 plus 25 is 42.", "<|user|> says hi <|end|>"] * 20


ODD = ["", " ", "  a  ", "\n\na\r\nb\t", "🙂👩\u200d👩\u200d👧", "a\u0301\u200b", "don't  1,234.5", "\ufeffx",
       "<0x0A> <unk> <s>", "<|user|> <|end|><|bos|>", "\x00\x7f"]  # fmt: skip
KINDS = ["byte_bpe", "bpe", "unigram"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[str]:
    """Pieces of an English and a Chinese text, cut anywhere."""
    with gzip.open(shared_data / "pt_zh_classics" / "hongloumeng.txt.gz", "rt", encoding="utf-8", newline="") as file:
        chinese = file.read(160_000)
    english = next((shared_data / "pt_wikitext2").glob("*.txt")).read_text(encoding="utf-8")[:160_000]
    return [text[at : at + 211] for text in (chinese, english) for at in range(0, len(text), 211)]


def decoded(tokenizer: Any, texts: list[str]) -> list[str]:
    return tokenizer.backend_tokenizer.decode_batch(encode_texts(tokenizer, texts), skip_special_tokens=False)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_every_kind_begins_with_the_tokens_of_its_format(kind: str, template: str, tmp_path: Path) -> None:
    more = ("<|fim_prefix|>",)
    trained = train_tokenizer(TEXTS, 400, kind=kind, template=template, more=more)
    control = ["<|pad|>", "<|bos|>", "<|eos|>", *TEMPLATES[template].control, *more]
    trained.save_pretrained(tmp_path)
    for made in (trained, AutoTokenizer.from_pretrained(tmp_path)):
        assert made.convert_tokens_to_ids(control) == list(range(len(control)))
        assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
        assert made.chat_template == TEMPLATES[template].jinja and set(control) <= set(made.all_special_tokens)
        assert decoded(made, control + ODD) == control + ODD
        assert not {i for ids in encode_texts(made, control) for i in ids} & set(range(len(control)))
    least = smallest_vocabulary(kind, template, more)
    assert least == 256 + len(control) + (kind != "byte_bpe")
    with pytest.raises(UserError, match=f"tokens need {least}"):
        train_tokenizer(TEXTS, least - 1, kind=kind, template=template, more=more)


@pytest.mark.parametrize("kind", KINDS)
def test_english_and_chinese_come_back_exactly(kind: str, real: list[str]) -> None:
    trained = train_tokenizer(real[::7], 3000, kind=kind)
    texts = real + ODD
    assert decoded(trained, texts) == texts
    tokens = sum(map(len, encode_texts(trained, real)))
    assert tokens < 0.45 * sum(len(t.encode()) for t in real)  # it learnt something
    again = train_tokenizer(real[::7], 3000, kind=kind)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_digits_stand_apart_and_line_feeds_are_bytes(kind: str) -> None:
    trained = train_tokenizer(["1234 1234\n12 34\n"] * 50, 300, kind=kind)
    tokens = trained.convert_ids_to_tokens(encode_texts(trained, ["12\n34"])[0])
    assert tokens == ["1", "2", "<0x0A>", "3", "4"]
    assert decoded(trained, ["1▁2"]) == ["1 2"]  # the one character that SentencePiece takes for another: U+2581


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_rare_characters_are_bytes_where_the_vocabulary_is_small(kind: str) -> None:
    many = "".join(chr(0x4E00 + i) for i in range(500))
    trained = train_tokenizer([many, "a b " * 500], 300, kind=kind)
    assert len(trained) <= 300 and decoded(trained, [many]) == [many]
    with pytest.raises(UserError, match="no text, or no room for characters"):
        train_tokenizer([""], 400, kind=kind)


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


# Files of other projects


@pytest.mark.parametrize("name", ["open_llama_32k", "storyllamas_4096"])
def test_sentencepiece_models_give_their_own_ids_and_every_text_back(
    name: str, shared_data: Path, real: list[str]
) -> None:
    path = shared_data / "tok_open" / f"{name}.model"
    ours, theirs = open_pieces(path), sentencepiece.SentencePieceProcessor(str(path))
    roles = (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == roles
    assert (ours.pad_token_id if ours.pad_token_id is not None else -1) == theirs.pad_id()
    assert decoded(ours, real + ODD) == real + ODD
    # these two also drop spaces at the ends and in rows, which would not come back
    plain = [" ".join(text.split(" ")) for text in real if "  " not in text and text == text.strip(" ")]
    assert len(plain) > 500
    assert encode_texts(ours, plain) == theirs.encode(plain)


def test_a_model_that_rewrites_text_is_refused(shared_data: Path) -> None:
    with pytest.raises(UserError, match="its normalisation 'nfkc' rewrites text"):
        open_pieces(shared_data / "tok_open" / "sentencepiece_test_1000.model")


@cache
def made(texts: tuple[str, ...] = tuple(TEXTS), **changes: Any) -> bytes:
    model = io.BytesIO()
    settings = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**settings, **changes}
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_models_rule_for_the_space_in_front_is_carried_over(kind: str, prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(made(model_type=kind, add_dummy_prefix=prefix))
    ours, theirs = open_pieces(path), sentencepiece.SentencePieceProcessor(str(path))
    texts = [t for t in ODD + TEXTS[:3] if "\x00" not in t]
    assert encode_texts(ours, texts) == theirs.encode(texts)
    assert decoded(ours, ODD) == ODD
    plain = without_prefix(ours.backend_tokenizer)
    assert (plain is ours.backend_tokenizer) is not prefix
    ids = encode_with(plain, ODD)
    assert plain.decode_batch(ids, skip_special_tokens=False) == ODD
    assert ours.convert_ids_to_tokens(encode_with(plain, ["river"])[0])[0][0] != "▁"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_no_merge_of_a_models_pieces_makes_a_control_token(kind: str, tmp_path: Path) -> None:
    """Its vocabulary has "<s", "</s" and ">", which SentencePiece itself would never join to "<s>"."""
    path = tmp_path / "m.model"
    path.write_bytes(made(("a<s b<s c> d> e</s f</s " * 9,) * 20, model_type=kind, split_by_unicode_script=False))
    ours, theirs = open_pieces(path), sentencepiece.SentencePieceProcessor(str(path))
    if kind == "bpe":
        assert {"<s", "</s", ">"} <= ours.get_vocab().keys()
    for text in ("<s>", "a</s>", "x<s> y</s>"):
        assert encode_texts(ours, [text])[0] == theirs.encode(text)
        assert not set(encode_texts(ours, [text])[0]) & set(ours.all_special_ids)


def test_what_is_no_tokenizer_or_loses_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    for content, words in (
        (made(byte_fallback=False), "no bytes for characters it does not know"),
        (made(model_type="char"), "words or characters; BPE and Unigram can be read"),
        (b"nothing of the kind", "no SentencePiece model, tiktoken ranks or tokenizer.json"),
        (b"", "no SentencePiece model, tiktoken ranks or tokenizer.json"),
        (b"YQ== 0\nYg==\n", "line 2: no tiktoken rank"),
        (b"YQ== 0\n!! 1\n", "line 2: no tiktoken rank"),
        (b"YQ== 0\nYg== 2\n", "no whole tiktoken file"),
        (b'{"model": 1}', "holds no tokenizer that can be opened"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            open_pieces(path)


def ranked(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Tiktoken's rule for one piece: while there is one, join the neighbours whose token has the lowest rank."""
    parts = [bytes([b]) for b in text.encode()]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not pairs:
            return [ranks[p] for p in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_a_tiktoken_file_gives_tiktokens_ids(shared_data: Path, real: list[str]) -> None:
    """The ids of one sentence stand in torchtune's tests of the same file; the others follow from tiktoken's rule."""
    import regex

    path = shared_data / "tok_open" / "torchtune_tiktoken_small.model"
    ours = open_pieces(path)
    sentence = "I can see the sun. But even if I cannot see the sun, I know that it exists."
    assert encode_texts(ours, [sentence])[0] == [
        73, 503, 654, 262, 376, 110, 46, 690, 720, 428, 270, 1119, 654, 262, 376, 110, 44, 270, 686, 334, 312, 522,
        511, 115, 46,
    ]  # fmt: skip
    lines = path.read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    split = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    for text in real[::5] + ODD:
        expected = [i for piece in split.findall(text) for i in (
            [ranks[piece.encode()]] if piece.encode() in ranks else ranked(piece, ranks)
        )]  # fmt: skip
        assert encode_texts(ours, [text])[0] == expected
    assert decoded(ours, real + ODD) == real + ODD


def test_llama_3s_special_tokens_follow_the_ranks(tmp_path: Path) -> None:
    """With 128,000 ranks: begin_of_text 128000, end_of_text 128001, pad 128004, headers 128006 and 128007, eom 128008,
    eot 128009, python_tag 128010 (torchtune's tests of its Llama 3 tokenizer); 256 in all."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256)))
    ours = from_tiktoken(path)
    named = {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6,
        "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
        "<|reserved_special_token_0|>": 2, "<|reserved_special_token_2|>": 5, "<|reserved_special_token_247|>": 255,
    }  # fmt: skip
    assert {t: ours.convert_tokens_to_ids(t) - 256 for t in named} == named
    assert len(LLAMA3_TOKENS) == len(set(LLAMA3_TOKENS)) == 256 and len(ours) == 512
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (256, 257, 260)
    assert encode_texts(ours, ["<|eot_id|>"])[0] == list(b"<|eot_id|>")
    for name in ("llama-3", "llama-3.1"):
        opened = from_tiktoken(path)
        assert add_chat_tokens(opened, name) == [] and len(opened) == 512
        ends = (
            ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
            if name == "llama-3.1"
            else ("<|eot_id|>", "<|end_of_text|>")
        )
        assert stop_tokens(opened) == tuple(opened.convert_tokens_to_ids(ends))


def test_a_bare_tokenizer_json_is_told_its_roles(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(path))
    with pytest.raises(UserError, match="does not say which token ends a text"):
        open_pieces(path)
    with pytest.raises(UserError, match="has no token '</s>' .eos."):
        open_pieces(path, {"eos": "</s>"})
    opened = open_pieces(path, {"bos": "<|bos|>", "eos": "<|eos|>"})
    assert encode_texts(opened, TEXTS) == encode_texts(tokenizer, TEXTS)
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (1, 2, None)
    tokenizer.save_pretrained(tmp_path / "whole")  # a tokenizer_config.json beside it says so itself
    assert open_pieces(tmp_path / "whole" / "tokenizer.json").pad_token_id == 0
    assert json.loads(path.read_text())["model"]["type"] == "BPE"


def test_a_directory_of_a_lone_tokenizer_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(made())
    texts = [*ODD, *TEXTS[:3]]
    assert encode_texts(open_tokenizer(tmp_path), texts) == encode_texts(
        open_pieces(tmp_path / "tokenizer.model"), texts
    )


# Added tokens


@pytest.mark.parametrize("prefix", [True, False])
def test_added_words_are_one_token_and_text_around_them_comes_back(prefix: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(made(add_dummy_prefix=prefix))
    grown = open_pieces(path)
    size = len(grown)
    assert add_tokens(grown, ["<think>", "</think>", "<think>", "<unk>"]) == ["<think>", "</think>"]
    assert len(grown) == size + 2
    texts = ["a<think>b", "a <think> b</think>", "<think></think>x", "<think>", "  <think>  y", "<think>红<think>"]
    assert decoded(grown, texts) == texts
    for text in texts:
        assert sum(i >= size for i in encode_texts(grown, [text])[0]) == text.count("think>")
    grown.save_pretrained(tmp_path / "kept")
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert encode_texts(kept, texts) == encode_texts(grown, texts) and decoded(kept, texts) == texts
    plain = without_prefix(kept.backend_tokenizer)
    assert plain.decode_batch(encode_with(plain, texts), skip_special_tokens=False) == texts


def test_a_format_is_replaced_only_on_purpose(tokenizer) -> None:
    trained = train_tokenizer(TEXTS, 400)
    with pytest.raises(UserError, match="template of its own"):
        add_chat_tokens(trained, "chatml")
    assert add_chat_tokens(trained, "chatml", replace=True) == ["<|im_start|>", "<|im_end|>"]
    assert set(CONTROL_TOKENS) <= set(trained.all_special_tokens)  # what was special stays so
    assert stop_tokens(trained) == (trained.convert_tokens_to_ids("<|im_end|>"), 2)
