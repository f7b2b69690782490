"""What pretraining reads: sources one after another, without duplicates and overlap with evaluation sets, in shares.

    corpus = Corpus({"web": [...], "books": [...]})           # or read_corpus, from a row's inputs
    corpus.clean(settings.clean, {"questions": [...]})
    documents = corpus.mixed(settings.mixture, tokens_of, seed)
    corpus.figures                                     # counts for the row's metrics

Duplicates are looked for over all sources, in the order in which they are named, and the first of several stays. What
is left out depends on the records and settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.contamination import Found, Overlap, pieces
from pipeline.data.corpus_settings import CleaningSettings, MixtureSettings
from pipeline.data.duplicates import near_repeats, repeats
from pipeline.data.mixture import mix
from pipeline.data.reader import Reader
from pipeline.data.records import Comparison, Conversation, Document, Message, Prompt, Rated
from pipeline.data.template import message_text
from pipeline.flow.errors import UserError


def read_corpus(reader: Reader, documents: Any, more: Sequence[Any]) -> Corpus:
    """The documents of a row's inputs, by the names of their rows or sources, or by reference where two share one."""
    artifacts = [documents, *more]
    slots = ["documents", *(f"more.{number}" for number in range(1, len(artifacts)))]
    read = [reader.read(slot, artifact, "documents") for slot, artifact in zip(slots, artifacts, strict=True)]
    for key in ("row", "ref"):
        names = [str(a.meta.get(key) or slot) for a, slot in zip(artifacts, slots, strict=True)]
        if len(set(names)) == len(names):
            break
    return Corpus(dict(zip(names, read, strict=True)))


def read_evaluations(reader: Reader, artifacts: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Records of evaluation sets of any kind, by reference."""
    sets: dict[str, Sequence[Any]] = {}
    for number, artifact in enumerate(artifacts):
        slot = f"evaluations.{number}"
        sets[str(artifact.meta.get("ref") or slot)] = reader.read(slot, artifact, artifact.kind)
    return sets


class Corpus:
    """Documents by source. `figures` tells what was left out and what was read how often."""

    def __init__(self, sources: Mapping[str, Sequence[Document]]) -> None:
        self.sources = {name: list(documents) for name, documents in sources.items()}
        self.figures: dict[str, Any] = {}

    @property
    def documents(self) -> list[Document]:
        """Every document once, source after source."""
        return [document for documents in self.sources.values() for document in documents]

    def clean(self, settings: CleaningSettings, evaluations: Mapping[str, Sequence[Any]]) -> None:
        """Leave out duplicates, then what overlaps with evaluation sets. UserError where a source has nothing left."""
        if settings.duplicates != "keep":
            self._leave_out("exact", repeats(self._texts()))
        if settings.duplicates == "near":
            self._leave_out("near", near_repeats(self._texts(), settings.similarity))
        if evaluations:
            self._without(evaluations, settings)
        for name, documents in self.sources.items():
            if not documents:
                raise UserError(f"{name}: every document is a duplicate or overlaps with an evaluation set")

    def mixed(
        self, settings: MixtureSettings | None, tokens_of: Callable[[Sequence[Document]], Sequence[int]], seed: int
    ) -> list[Document]:
        """The documents in the order in which they are read; `tokens_of` gives how many tokens each has."""
        if settings is None:
            return self.documents
        tokens = {name: list(tokens_of(documents)) for name, documents in self.sources.items()}
        chosen = mix(tokens, settings.weights, settings.passes, seed)
        read = {name: [number for source, number in chosen if source == name] for name in tokens}
        amount = sum(tokens[name][number] for name, number in chosen)
        self.figures["mixture"] = {
            name: {
                "documents": len(numbers),
                "passes": (spent := sum(tokens[name][n] for n in numbers)) / sum(tokens[name]),
                "share": spent / amount,
            }
            for name, numbers in read.items()
        }
        return [self.sources[name][number] for name, number in chosen]

    def _texts(self) -> list[str]:
        return [document_text(document) for document in self.documents]

    def _leave_out(self, what: str, earlier: Sequence[int | None]) -> None:
        stays = iter([number is None for number in earlier])
        self.sources = {name: [d for d in documents if next(stays)] for name, documents in self.sources.items()}
        self.figures.setdefault("duplicates", {})[what] = sum(number is not None for number in earlier)

    def _without(self, evaluations: Mapping[str, Sequence[Any]], settings: CleaningSettings) -> None:
        sets = {name: [t for record in records for t in record_texts(record)] for name, records in evaluations.items()}
        overlap = Overlap(sets, settings.ngram)
        found = overlap.find(self._texts(), settings.common)
        each = iter(found)
        self.sources = {
            name: [left for document in documents for left in _left(document, next(each), settings.contaminated)]
            for name, documents in self.sources.items()
        }
        self.figures["contaminated"] = {
            "documents": sum(bool(f.sets) for f in found),
            "by_set": {name: sum(name in f.sets for f in found) for name in sets},
            "texts": {name: len(texts) for name, texts in sets.items()},
            "texts_too_short": overlap.short,
        }


def _left(document: Document, found: Found, how: str) -> list[Document]:
    """The document, or what is left of it; of a dialogue nothing is."""
    if not found.sets:
        return [document]
    if how == "drop" or document.messages:
        return []
    return [replace(document, text=piece) for piece in pieces(document.text or "", found.spans)]


def document_text(document: Document) -> str:
    return "\n".join(record_texts(document))


def record_texts(record: Any) -> list[str]:
    """What a record says, turn by turn, answers and reference answers too."""
    if isinstance(record, Document):
        return _turns(record.messages) if record.messages else [record.text or ""]
    if isinstance(record, Conversation):
        return _turns(record.messages)
    if isinstance(record, Prompt):
        return [*_turns(record.messages), *([record.answer] if record.answer else [])]
    if isinstance(record, Comparison):
        return [*_turns(record.prompt), *(c.text for c in record.completions)]
    if isinstance(record, Rated):
        return [*_turns(record.prompt), record.completion]
    raise TypeError(f"no text of a {type(record).__name__}")


def _turns(messages: Sequence[Message]) -> list[str]:
    return [message_text(m) for m in messages]
