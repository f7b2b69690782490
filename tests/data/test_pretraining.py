"""Documents under every objective: ids and loss weights, written out. A token with loss ends in an asterisk."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from pipeline.data.chat import ChatFormat
from pipeline.data.groups import document_groups
from pipeline.data.objectives import Causal, Denoiser, FillIn, Layout, Prefix, Spans, Ul2
from pipeline.data.pretraining import pretraining_groups, require_tokens
from pipeline.data.records import Document, Message
from pipeline.data.template import without_prefix
from pipeline.flow.errors import UserError
from pipeline.llama.tokenizer import add_chat_tokens, from_sentencepiece, train_tokenizer
from tests.data.test_templates import prefixing
from tests.small import chat

DOCUMENTS = [Document(text) for text in ("abcdefghijklmnop", "qrs", "tuvwxyz", "x")]
FEW = {"density": 0.3, "mean_span": 2, "sentinels": 4}


@cache
def chat_of(tokens: tuple[str, ...]) -> ChatFormat:
    """Every ASCII character is one token."""
    return ChatFormat(train_tokenizer([], 264 + len(tokens), more=tokens))


def windows(objective: Layout, max_tokens: int, documents: Any = DOCUMENTS, seed: int = 0) -> list[str]:
    chat = chat_of(objective.control_tokens())
    found = pretraining_groups(documents, chat, max_tokens, objective, seed)
    assert all(len(group) == 1 and len(group[0].ids) <= max_tokens for group in found.groups)
    return [shown(chat, group[0]) for group in found.groups]


def shown(chat: ChatFormat, segment: Any) -> str:
    names = {"fim_prefix": "PRE", "fim_suffix": "SUF", "fim_middle": "MID", "targets": "TO"}
    words = [t.strip("<|>") if t.startswith("<|") else t for t in chat.tokenizer.convert_ids_to_tokens(segment.ids)]
    words = [names.get(word, word.removeprefix("span_")) for word in words]
    return " ".join(word + "*" * int(weight) for word, weight in zip(words, segment.weights, strict=True))


def test_without_an_objective_windows_are_those_of_next_token_prediction():
    plain, named = document_groups(DOCUMENTS, chat(), 12), pretraining_groups(DOCUMENTS, chat(), 12, Causal(), 0)
    assert named == plain
    assert windows(Causal(), 12)[1:3] == ["l m* n* o* p* eos*", "bos q* r* s* eos*"]


def test_prefix():
    assert windows(Prefix(), 12) == [
        "bos a b c d e* f* g* h* i* j* k*",
        "l m n o p eos*",
        "bos q r s eos*",
        "bos t u v w x y z* eos*",
        "bos x* eos*",
    ]


def test_fill_in_the_middle_prefix_first():
    """abcdefgh cut after a and e: the window of 13 is full with bos, three marks and eos."""
    assert windows(FillIn(rate=1, spm=0), 13) == [
        "bos PRE a* SUF f* g* h* MID b* c* d* e* eos*",
        "PRE i* j* k* SUF o* p* MID l* m* n* eos*",
        "bos PRE q* SUF s* MID r* eos*",
        "bos PRE t* u* v* w* SUF z* MID x* y* eos*",
        "bos PRE SUF MID x* eos*",
    ]


def test_fill_in_the_middle_suffix_first():
    """The same cuts in the other order: prefix and middle are one run behind MID."""
    assert windows(FillIn(rate=1, spm=1), 13) == [
        "bos PRE SUF f* g* h* MID a* b* c* d* e* eos*",
        "PRE SUF o* p* MID i* j* k* l* m* n* eos*",
        "bos PRE SUF s* MID q* r* eos*",
        "bos PRE SUF z* MID t* u* v* w* x* y* eos*",
        "bos PRE SUF MID x* eos*",
    ]


def test_fill_in_the_middle_leaves_some_windows_as_they_are():
    assert windows(FillIn(), 13)[2:] == [
        "bos q* r* s* eos*",
        "bos PRE SUF z* MID t* u* v* w* x* y* eos*",
        "bos x* eos*",
    ]
    made = pretraining_groups(DOCUMENTS * 250, chat_of(FillIn().control_tokens()), 13, FillIn(rate=0.8), 0).made
    assert (
        sum(made.values()) == 1250 and 930 < made["psm"] + made["spm"] < 1070 and abs(made["psm"] - made["spm"]) < 130
    )


def test_no_space_is_put_before_what_follows_in_the_middle_of_a_text():
    """SentencePiece puts one before every text; what goes on where other text ends has none."""
    tokenizer = from_sentencepiece(prefixing())
    tokenizer.add_tokens(list(FillIn().control_tokens()), special_tokens=True)
    add_chat_tokens(tokenizer, "chatml")
    chat = ChatFormat(tokenizer)
    texts = ["wonderful weather today, is it not wonderful weather", "seven thousand words", " a space in front"]
    found = pretraining_groups([Document(t) for t in texts], chat, 32, FillIn(rate=1), 0)
    backend = without_prefix(tokenizer.backend_tokenizer)
    read = ["", "", ""]
    for record, group in zip(found.kept, found.groups, strict=True):
        read[record] += backend.decode(in_order(chat, group[0].ids), skip_special_tokens=True)
    assert len(found.groups) > 3 and read == [" " + text for text in texts]  # the one space in front of a document


def in_order(chat: ChatFormat, ids: list[int]) -> list[int]:
    """Prefix, middle and suffix of a window that was rearranged."""
    pre, suf, mid = (ids.index(chat.tokenizer.get_vocab()[t]) for t in FillIn().control_tokens())
    bos, eos = ids[:pre], [i for i in ids[mid:] if i == chat.eos_id]
    middle = ids[mid + 1 : len(ids) - len(eos)]
    if suf == pre + 1:  # suffix, prefix, middle: prefix and middle are one run
        return [*bos, *middle, *ids[suf + 1 : mid]]
    return [*bos, *ids[pre + 1 : suf], *middle, *ids[suf + 1 : mid]]


def test_span_corruption():
    """16 characters, 5 hidden in 2 spans; no loss on what is given, and all of the targets have it."""
    assert windows(Spans(**FEW), 24) == [
        "bos a b c d e f g 0 i j k l 1 TO 0* h* 1* m* n* o* p* eos*",
        "bos q r 0 TO 0* s* eos*",
        "bos t u v w x 0 TO 0* y* z* eos*",
        "bos 0 TO 0* x* eos*",
    ]


def test_a_mixture_of_denoisers():
    """The first window goes on in the second, so that no eos ends it."""
    assert windows(Ul2(sentinels=8), 24) == [
        "bos S a b c d e f g h i j k l m n*",
        "R o 0 TO 0* p* eos*",
        "bos X q 0 TO 0* r* s* eos*",
        "bos R t u v w x y 0 TO 0* z* eos*",
        "bos X 0 TO 0* x* eos*",
    ]
    only = (Denoiser(mode="S", density=0.25), Denoiser(mode="X", density=0.5, mean_span=2, weight=3.0))
    mixture = Ul2(denoisers=only, sentinels=8)
    made = pretraining_groups(DOCUMENTS * 250, chat_of(mixture.control_tokens()), 30, mixture, 0).made
    assert sum(made.values()) == 1000 and 700 < made["X"] < 800


OBJECTIVES = [Prefix(), FillIn(), Spans(density=0.3, mean_span=2, sentinels=30), Ul2(sentinels=30)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_cuts_follow_from_seed_and_record_alone(objective: Layout):
    """A record keeps its windows whatever stands behind it, and other seeds cut elsewhere."""
    whole = windows(objective, 40, DOCUMENTS * 5)
    assert whole[: len(windows(objective, 40, DOCUMENTS * 3))] == windows(objective, 40, DOCUMENTS * 3)
    assert whole == windows(objective, 40, DOCUMENTS * 5) != windows(objective, 40, DOCUMENTS * 5, seed=1)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("max_tokens", [14, 33, 64])
def test_nothing_of_a_text_is_lost_and_no_window_is_too_long(objective: Layout, max_tokens: int):
    draw = random.Random(0)
    texts = ["".join(draw.choice("abcdefg ") for _ in range(draw.randrange(1, 150))) for _ in range(60)]
    chat = chat_of(objective.control_tokens())
    found = pretraining_groups([Document(t) for t in texts], chat, max_tokens, objective, 3)
    letters: dict[int, list[str]] = {}
    for record, (segment,) in zip(found.kept, found.groups, strict=True):
        assert len(segment.ids) <= max_tokens and segment.weights[0] == 0 and sum(segment.weights) > 0
        letters.setdefault(record, []).append(chat.decode(list(segment.ids)))
    assert [sorted("".join(letters[r])) for r in range(60)] == [sorted(t) for t in texts]


def test_characters_are_cut_inside_of_words_where_tokens_come_back():
    """Two tokens of text; where they are cut, the parts are encoded each by itself, and decode to the text."""
    marks = FillIn().control_tokens()
    chat = ChatFormat(train_tokenizer(["river river"] * 99, 290, more=marks))
    text = Document(" river river")
    assert len(chat.document_ids(text)) == 4
    made = [pretraining_groups([text], chat, 30, FillIn(rate=1, spm=1), seed).groups[0][0] for seed in range(40)]
    parts = [chat.tokenizer.decode(list(segment.ids)).split("<|fim_middle|>") for segment in made]
    joined = {middle.removesuffix("<|eos|>") + suffix.split("<|fim_suffix|>")[1] for suffix, middle in parts}
    assert joined == {" river river"}
    assert {len(segment.ids) for segment in made} > {7, 8}  # 5 control tokens; a word that was cut has more than one
    tight = [pretraining_groups([text], chat, 7, FillIn(rate=1, spm=1), seed).groups[0][0] for seed in range(40)]
    assert {len(segment.ids) for segment in tight} == {7}  # no room for more: between tokens


def test_a_dialogue_is_cut_between_tokens():
    """Its control tokens would not come back from the text."""
    spoken = Document(messages=(Message("user", "ab"), Message("assistant", "cd")))
    (window,) = windows(FillIn(rate=1, spm=0), 30, [spoken])
    assert sorted(w.rstrip("*") for w in window.split()) == sorted(
        ["bos", "PRE", "user", "a", "b", "end", "assistant", "c", "d", "end", "SUF", "MID", "eos"]
    )


def test_a_tokenizer_without_the_control_tokens_is_refused():
    require_tokens(chat().tokenizer, Prefix())
    with pytest.raises(
        UserError, match=r"has no <\|fim_prefix\|> and 2 more, control tokens of this objective; give the row"
    ):
        pretraining_groups(DOCUMENTS, chat(), 20, FillIn(), 0)
    with pytest.raises(UserError, match=r"has no <\|span_4\|>, "):
        require_tokens(chat_of(Spans(**FEW).control_tokens()).tokenizer, Spans(sentinels=5))


def test_control_tokens_stand_behind_those_of_chats_and_text_never_spells_them():
    tokens = Ul2(sentinels=2).control_tokens()
    assert tokens == ("<|R|>", "<|S|>", "<|X|>", "<|targets|>", "<|span_0|>", "<|span_1|>")
    tuned = chat_of(tokens)
    assert tuned.tokenizer.convert_tokens_to_ids(tokens) == list(range(8, 14))
    ids = tuned.document_ids(Document("<|R|> <|span_0|>"))
    assert not set(ids) & set(range(8, 14)) and tuned.decode([*ids[1:-1], 12]) == "<|R|> <|span_0|>"
