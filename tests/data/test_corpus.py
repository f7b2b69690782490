"""Sources read, cleaned and mixed: what stays, in which order, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.corpus import Corpus, read_corpus, read_evaluations, record_texts
from pipeline.data.corpus_settings import CleaningSettings, MixtureSettings
from pipeline.data.reader import Reader
from pipeline.data.records import Conversation, Document, Message, Prompt, Rated
from pipeline.data.sources import write_jsonl
from pipeline.flow.artifacts import KINDS, describe
from pipeline.flow.errors import UserError
from tests.small import Listener, ask, comparison


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def texts(corpus: Corpus) -> dict[str, list[str | None]]:
    return {name: [d.text for d in documents] for name, documents in corpus.sources.items()}


def corpus(**sources: list[str]) -> Corpus:
    return Corpus({name: [Document(t) for t in found] for name, found in sources.items()})


def test_the_defaults_leave_everything_as_it_is():
    made = corpus(a=["x", "x"], b=["y"])
    made.clean(CleaningSettings(), {})
    assert [d.text for d in made.mixed(None, len, 0)] == ["x", "x", "y"] and made.figures == {}  # type: ignore[arg-type]


def test_duplicates_are_counted_over_all_sources_and_the_first_stays():
    made = corpus(a=[numbered(0, 100), "x"], b=["x ", numbered(10, 110), "y"])
    made.clean(CleaningSettings(duplicates="near"), {})
    assert texts(made) == {"a": [numbered(0, 100), "x"], "b": ["y"]}
    assert made.figures == {"duplicates": {"exact": 1, "near": 1}}
    made = corpus(a=[numbered(0, 100), "x"], b=["x ", numbered(10, 110), "y"])
    made.clean(CleaningSettings(duplicates="exact"), {})
    assert made.figures == {"duplicates": {"exact": 1}} and len(made.documents) == 4


def test_overlap_with_named_sets_is_left_out_and_counted():
    made = corpus(a=[f"x {numbered(0, 14)}", "fine"], b=[numbered(100, 120)])
    sets = {
        "questions": [Prompt("p", ask(numbered(0, 13)), answer="yes"), Prompt("q", ask(numbered(1, 14)))],
        "pairs": [comparison("hm", numbered(90, 130), "no")],
    }
    with pytest.raises(UserError, match="b: every document is a duplicate or overlaps with an evaluation set"):
        made.clean(CleaningSettings(), sets)
    assert made.figures["contaminated"] == {
        "documents": 2,
        "by_set": {"questions": 1, "pairs": 1},
        "texts": {"questions": 3, "pairs": 3},
        "texts_too_short": {"questions": 1, "pairs": 2},
    }
    assert texts(made) == {"a": ["fine"], "b": []}


def test_a_run_is_cut_out_of_a_document_and_a_dialogue_goes_whole():
    long = f"{numbered(1000, 1100)} {numbered(0, 13)} {numbered(2000, 2100)}"
    spoken = Document(messages=(Message("user", numbered(0, 13)), Message("assistant", numbered(3000, 3100))))
    made = Corpus({"a": [Document(long, source="f:1"), spoken]})
    made.clean(CleaningSettings(contaminated="cut"), {"q": [Document(numbered(0, 13))]})
    assert [d.source for d in made.documents] == ["f:1", "f:1"]
    front, back = (d.text or "" for d in made.documents)
    at = long.index("w0 ")
    assert front == long[: at - 200] and back == long[at + len(numbered(0, 13)) + 200 :]
    assert made.figures["contaminated"]["documents"] == 2


def test_shares_are_those_of_tokens():
    made = corpus(web=["w"] * 8, books=["b" * 2] * 3)
    read = made.mixed(MixtureSettings(weights={"web": 1, "books": 3}), lambda ds: [len(d.text or "") for d in ds], 0)
    assert [d.text for d in read] == ["w", "w", "bb", "bb", "bb"]
    assert made.figures["mixture"] == {
        "web": {"documents": 2, "passes": 0.25, "share": 0.25},
        "books": {"documents": 3, "passes": 1.0, "share": 0.75},
    }


@pytest.mark.parametrize(
    ("weights", "sources", "message"),
    [
        ({"web": 1, "boks": 1}, ["web", "books"], "the row reads nothing called 'boks'; did you mean 'books'?"),
        ({"web": 1}, ["web", "books"], "weights: books has none"),
        ({"world": 1}, ["world", "world"], "two sources are called world"),
    ],
)
def test_weights_name_the_sources(weights: dict[str, float], sources: list[str], message: str):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        MixtureSettings(weights=weights).require_names("pretrain", sources)


def test_a_weight_is_positive():
    with pytest.raises(ValueError, match="weights: web must be above 0"):
        MixtureSettings(weights={"web": 0})


def test_texts_of_every_kind_of_record():
    turns = (Message("user", "a"), Message("assistant", "b"))
    assert record_texts(Document("t")) == ["t"]
    assert record_texts(Document(messages=turns)) == record_texts(Conversation(turns)) == ["a", "b"]
    assert record_texts(comparison("q", "x", "y")) == ["q", "x", "y"]
    assert record_texts(Rated(ask("q"), "x", True)) == ["q", "x"]
    with pytest.raises(TypeError, match="no text of a str"):
        record_texts("x")


def test_inputs_are_named_by_row_or_source_and_by_reference_where_two_share_a_row(tmp_path: Path):
    def artifact(name: str, ref: str, kind: str = "documents") -> Any:
        directory = tmp_path / ref
        directory.mkdir()
        write_jsonl(directory / "data.jsonl", [Document(ref)] if kind == "documents" else [Prompt("p", ask("q"))])
        meta = describe(directory, kind, {})
        return KINDS[kind](directory, tuple(meta["files"]), meta["digest"], {}, meta | {"row": name, "ref": ref})

    world, web = artifact("world", "world.documents"), artifact("web", "web")
    reader = Reader(Listener())
    assert texts(read_corpus(reader, world, [web])) == {"world": ["world.documents"], "web": ["web"]}
    assert set(reader.counts) == {"documents", "more.1"}
    both = read_corpus(reader, world, [artifact("world", "world.heldout_documents")])
    assert list(both.sources) == ["world.documents", "world.heldout_documents"]
    assert list(read_evaluations(reader, [artifact("world", "world.heldout", "prompts")])) == ["world.heldout"]
