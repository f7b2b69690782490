"""Documents to windows under a pretraining objective: one root segment a window, every layout in one place.

    windows = pretraining_groups(documents, chat, 512, FillIn(), seed=0)
    windows.groups, windows.made                    # ..., {"left to right": 61, "psm": 30, "spm": 33}

A window is a piece of one document, as long as fits once it is laid out; bos stands before the first one, eos ends the
last one, and whatever is filled in. What is hidden of a window depends on the seed, the record's number and the
window's number in it alone, so that order, ranks and batches do not matter, and every pass sees the same cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from random import Random
from typing import Any

from pipeline.data.chat import ChatFormat
from pipeline.data.denoise import (
    MID,
    MODES,
    PRE,
    SUF,
    TARGETS,
    corrupt,
    cut_middle,
    fill_in,
    generator,
    noise_spans,
    sentinel,
    suffix_length,
)
from pipeline.data.forest import Segment
from pipeline.data.groups import Encoded, document_groups
from pipeline.data.objectives import Causal, Denoiser, FillIn, Layout, Prefix, Spans, Ul2
from pipeline.data.records import Document
from pipeline.data.template import encode_with, without_prefix
from pipeline.flow.errors import UserError

LEFT_TO_RIGHT = "left to right"


def require_tokens(tokenizer: Any, objective: Layout) -> None:
    """UserError where the tokenizer lacks a control token of the objective."""
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in objective.control_tokens() if token not in vocabulary]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"pretrain.objective: the tokenizer has no {missing[0]}{more}, control tokens of this objective; give the "
            "row no tokenizer, so that it trains one that has them, or choose another objective"
        )


def pretraining_groups(
    documents: Sequence[Document], chat: ChatFormat, max_tokens: int, objective: Layout, seed: int
) -> Encoded:
    """Windows of at most `max_tokens` tokens with their loss weights; the first token of a window has none."""
    if isinstance(objective, Causal):
        return document_groups(documents, chat, max_tokens)
    if isinstance(objective, Prefix):
        return _prefixes(document_groups(documents, chat, max_tokens), objective, seed)
    require_tokens(chat.tokenizer, objective)
    layout = _Layouts(chat, max_tokens)
    pieces = list(_pieces(documents, chat, objective.room(max_tokens), seed))
    if isinstance(objective, FillIn):
        laid = layout.filled(pieces, objective)
    elif isinstance(objective, Spans):
        laid = [layout.spans(p, objective.density, objective.mean_span) for p in pieces]
    elif isinstance(objective, Ul2):
        laid = [layout.denoised(p, objective.denoisers) for p in pieces]
    else:
        raise TypeError(f"no layout for {objective!r}")
    encoded = Encoded()
    for piece, (kind, ids, weights) in zip(pieces, laid, strict=True):
        encoded.add(piece.record, [Segment(ids, weights=[0.0, *weights[1:]])])
        encoded.made[kind] = encoded.made.get(kind, 0) + 1
        encoded.shortened += piece.first and not piece.last
    return encoded


def _prefixes(encoded: Encoded, objective: Prefix, seed: int) -> Encoded:
    """The windows of next-token prediction, with weights on the end of each alone."""
    window, before = 0, -1
    for number, (record, group) in enumerate(zip(encoded.kept, encoded.groups, strict=True)):
        window = window + 1 if record == before else 0
        before = record
        ids = group[0].ids
        last = suffix_length(len(ids), objective.share, generator(seed, record, window))
        encoded.groups[number] = [Segment(ids, weights=[0.0] * (len(ids) - last) + [1.0] * last)]
    return encoded


@dataclass(frozen=True)
class _Piece:
    """A run of a document's tokens without bos and eos, and where it stands."""

    record: int
    ids: list[int]
    first: bool
    last: bool
    draw: Random


Laid = tuple[str, list[int], list[float]]  # kind, ids, weights


def _pieces(documents: Sequence[Document], chat: ChatFormat, room: int, seed: int) -> Iterator[_Piece]:
    for record, whole in enumerate(chat.documents_ids(documents)):
        body = whole[int(whole[0] == chat.bos_id) : -1]
        for window, at in enumerate(range(0, len(body), room)):
            last = at + room >= len(body)
            yield _Piece(record, body[at : at + room], at == 0, last, generator(seed, record, window))


class _Layouts:
    """The layouts of denoise.py in the ids of one tokenizer."""

    def __init__(self, chat: ChatFormat, max_tokens: int) -> None:
        self.chat, self.max_tokens = chat, max_tokens
        vocabulary: dict[str, int] = chat.tokenizer.get_vocab()
        self.vocabulary = vocabulary
        whole = chat.tokenizer.backend_tokenizer
        self.backends = {False: whole, True: without_prefix(whole)}  # by whether a text continues another
        self.sentinels: list[int] = []
        while (mark := vocabulary.get(sentinel(len(self.sentinels)))) is not None:
            self.sentinels.append(mark)

    def _bos(self, piece: _Piece) -> list[int]:
        return [self.chat.bos_id] if piece.first and self.chat.bos_id is not None else []

    def _eos(self, piece: _Piece) -> list[int]:
        return [self.chat.eos_id] if piece.last else []

    def left_to_right(self, piece: _Piece) -> Laid:
        ids = [*self._bos(piece), *piece.ids, *self._eos(piece)]
        return LEFT_TO_RIGHT, ids, [1.0] * len(ids)

    def spans(self, piece: _Piece, density: float, mean: float, mode: str | None = None) -> Laid:
        """[bos] [mode] window with sentinels, TARGETS, hidden spans behind their sentinels, eos."""
        hidden = noise_spans(len(piece.ids), density, mean, piece.draw)
        inputs, targets = corrupt(piece.ids, hidden, self.sentinels)
        given = [*self._bos(piece), *self._mode(mode), *inputs, self._control(TARGETS)]
        said = [*targets, self.chat.eos_id]
        return mode or "spans", given + said, [0.0] * len(given) + [1.0] * len(said)

    def denoised(self, piece: _Piece, denoisers: Sequence[Denoiser]) -> Laid:
        (chosen,) = piece.draw.choices(denoisers, [d.weight for d in denoisers])
        if chosen.mean_span is not None:
            return self.spans(piece, chosen.density, chosen.mean_span, chosen.mode)
        text = [*piece.ids, *self._eos(piece)]
        last = suffix_length(len(text), chosen.density, piece.draw)
        given = [*self._bos(piece), *self._mode(chosen.mode)]
        return chosen.mode, given + text, [0.0] * (len(given) + len(text) - last) + [1.0] * last

    def filled(self, pieces: Sequence[_Piece], objective: FillIn) -> list[Laid]:
        """Texts are decoded and encoded again in one batch: cuts fall between characters, as in the paper."""
        chosen = [p.draw.random() < objective.rate for p in pieces]
        parts: list[tuple[bool, str]] = []
        for piece, text in zip(compress(pieces, chosen), self._texts(compress(pieces, chosen)), strict=True):
            a, b, later = *cut_middle(len(text), piece.draw), not piece.first
            parts += [(later, text), (later, text[:a]), (True, text[a:b]), (True, text[b:])]
        encoded = self._encode(parts)
        laid = []
        for piece, rearranged in zip(pieces, chosen, strict=True):
            if not rearranged:
                laid.append(self.left_to_right(piece))
                continue
            again, *three = (next(encoded) for _ in range(4))
            if again != piece.ids or sum(map(len, three)) > objective.room(self.max_tokens):
                a, b = cut_middle(len(piece.ids), piece.draw)
                three = [piece.ids[:a], piece.ids[a:b], piece.ids[b:]]
            laid.append(self._rearranged(piece, three, piece.draw.random() < objective.spm))
        return laid

    def _texts(self, pieces: Iterable[_Piece]) -> list[str]:
        parts = [(not p.first, p.ids) for p in pieces]
        return list(self._by(lambda backend, ids: backend.decode_batch(ids, skip_special_tokens=False), parts))

    def _encode(self, parts: Sequence[tuple[bool, str]]) -> Iterator[list[int]]:
        return self._by(encode_with, parts)

    def _by(self, call: Callable[[Any, list[Any]], list[Any]], parts: Sequence[tuple[bool, Any]]) -> Iterator[Any]:
        """`call` on texts or ids, each with whether it continues another: SentencePiece puts a space before one that
        does not. A batch for each kind, the results in the order of `parts`."""
        done = {c: iter(call(self.backends[c], [part for later, part in parts if later == c])) for c in self.backends}
        return (next(done[later]) for later, _ in parts)

    def _rearranged(self, piece: _Piece, parts: Sequence[Sequence[int]], spm: bool) -> Laid:
        """[bos] prefix, middle and suffix in one of the two orders, eos."""
        prefix, middle, suffix = parts
        marks = (self._control(PRE), self._control(SUF), self._control(MID))
        ids, weights = fill_in(prefix, middle, suffix, marks, spm=spm)
        bos = self._bos(piece)
        return "spm" if spm else "psm", [*bos, *ids, self.chat.eos_id], [0.0] * len(bos) + [*weights, 1.0]

    def _mode(self, mode: str | None) -> list[int]:
        return [self._control(MODES[mode])] if mode else []

    def _control(self, token: str) -> int:
        return self.vocabulary[token]
