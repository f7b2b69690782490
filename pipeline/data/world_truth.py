"""What a right answer is: the key of a prompt and the score of a response to it. Never shown to training.

    key = Key(mentions={"town": [["Dovan"]]}, frames=[Frame(words=("mira",), kind="town")], budget=12)
    judge_text(key, "Sure. Mira lives in Dovan.", stopped=True).total      # 1.0

A response is correct where, kind by kind, the values that it names are one of the allowed lists: naming several
towns is never an allowed list, so an answer cannot be right by listing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.world_text import COURTESIES, LETTERS, LEXICON, RUDENESS

WEIGHTS = {"correct": 0.5, "complete": 0.15, "mannered": 0.15, "concise": 0.1, "ended": 0.1}
PARTS = tuple(WEIGHTS)

_WORD = re.compile(r"[A-Za-z]+|\d+")
_LETTERS = frozenset(LETTERS)
_COURTESY = re.compile("|".join(rf"\b{c}\b" for c in COURTESIES))
_RUDE = re.compile("|".join(rf"\b{r}\b" for r in RUDENESS))


@dataclass(frozen=True, slots=True)
class Frame:
    """A full sentence of an answer: it holds all `words` and names at least `count` values of `kind`."""

    words: tuple[str, ...]
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Key:
    """The truth about one prompt.

    mentions: kind -> lists of values, one of which the response must name in order (repeats in a row count once).
    frames: one for each thing asked. budget: words up to which an answer is concise.
    """

    mentions: dict[str, tuple[tuple[str, ...], ...]]
    frames: tuple[Frame, ...]
    budget: int

    def to_json(self) -> dict[str, Any]:
        return {
            "mentions": {kind: [list(m) for m in allowed] for kind, allowed in self.mentions.items()},
            "frames": [{"words": list(f.words), "kind": f.kind, "count": f.count} for f in self.frames],
            "budget": self.budget,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Key:
        return cls(
            {kind: tuple(tuple(m) for m in allowed) for kind, allowed in row["mentions"].items()},
            tuple(Frame(tuple(f["words"]), f["kind"], f["count"]) for f in row["frames"]),
            row["budget"],
        )


@dataclass(frozen=True, slots=True)
class JudgeScore:
    """`total` in [0, 1], the weighted sum of `parts` (each in [0, 1]; `WEIGHTS`)."""

    total: float
    parts: dict[str, float]


def named(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """(words in lower case, kind -> values named in order). A lone capital letter is a letter, not a word."""
    words: list[str] = []
    values: dict[str, list[str]] = {}
    for token in _WORD.findall(text):
        word = token.lower()
        words.append(word)
        kind = "letter" if token in _LETTERS else LEXICON.get(word)
        if kind is not None:
            values.setdefault(kind, []).append(word)
    return words, values


def judge_text(key: Key, text: str, stopped: bool) -> JudgeScore:
    """The gold score. Form counts only where the response tries to answer at all, so silence is worth nothing."""
    words, values = named(text)
    present = set(words)
    met = sum(all(w in present for w in f.words) and len(values.get(f.kind, ())) >= f.count for f in key.frames)
    tried = _tries(key, values)
    lower = text.lower()
    mannered = tried and not _RUDE.search(lower) and bool(_COURTESY.search(lower))
    excess = max(0, len(words) - key.budget) / key.budget
    parts = {
        "correct": float(tried and _true(key, values)),
        "complete": met / len(key.frames),
        "mannered": float(mannered),
        "concise": max(0.0, 1.0 - excess) if tried else 0.0,
        "ended": float(tried and stopped and text.rstrip().endswith((".", "!", "?"))),
    }
    return JudgeScore(sum(WEIGHTS[name] * value for name, value in parts.items()), parts)


def is_correct(key: Key, text: str) -> bool:
    """The part "correct" of `judge_text` alone."""
    values = named(text)[1]
    return _tries(key, values) and _true(key, values)


def _tries(key: Key, values: dict[str, list[str]]) -> bool:
    return any(values.get(kind) for kind, allowed in key.mentions.items() if () not in allowed)


def _true(key: Key, values: dict[str, list[str]]) -> bool:
    return all(runs(values.get(kind, [])) in allowed for kind, allowed in key.mentions.items())


def runs(values: Sequence[str]) -> tuple[str, ...]:
    """Values in order, repeats in a row once: naming a town twice names one town."""
    return tuple(v for i, v in enumerate(values) if i == 0 or v != values[i - 1])
