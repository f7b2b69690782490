"""Training documents that hold a piece of an evaluation set: found by shared runs of words, as GPT-3's were.

    overlap = Overlap({"questions": ["..."]}, n=13)
    found = overlap.find(texts, common=10)          # for every text the sets it shares runs with, and where

Brown et al. 2020, appendix C: 13-grams of the evaluation sets are looked for in the training text; those in more than
10 training documents are common phrases and do not count. An evaluation text of 8 to 12 words is looked for whole; a
shorter one cannot be told from chance and is counted as too short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.grams import Hashes, grams, words

SHORTEST = 8  # words
AROUND = 200  # characters that go with a run on both sides; a piece that is shorter than this goes too
PIECES = 10  # a document that falls into more of them goes whole


@dataclass
class Found:
    """What a document shares with evaluation sets.

    sets    their names
    spans   characters [start, stop) of the runs, in order
    """

    sets: set[str] = field(default_factory=set)
    spans: list[tuple[int, int]] = field(default_factory=list)


class Overlap:
    """The word runs of named evaluation sets. `short` counts the texts of each that are too short to look for."""

    def __init__(self, sets: Mapping[str, Sequence[str]], n: int = 13) -> None:
        self.owners: dict[int, dict[int, set[str]]] = {}  # run length -> run -> sets that hold it
        self.short: dict[str, int] = dict.fromkeys(sets, 0)
        for name, texts in sets.items():
            for text in texts:
                found, _ = words(text)
                length = min(n, len(found))
                if length < min(SHORTEST, n):
                    self.short[name] += 1
                    continue
                table = self.owners.setdefault(length, {})
                for run in grams(found, length).tolist():
                    table.setdefault(run, set()).add(name)
        self._runs: dict[int, Hashes] = {
            length: np.array(sorted(table), np.uint64) for length, table in self.owners.items()
        }

    def find(self, texts: Sequence[str], common: int) -> list[Found]:
        """For every text what it shares; runs in more than `common` of the texts do not count (0: all count)."""
        shared: list[list[tuple[int, int, tuple[int, int]]]] = []  # by text: run length, run, characters
        texts_with: Counter[tuple[int, int]] = Counter()
        for text in texts:
            found, spans = words(text)
            here = []
            for length, runs in self._runs.items():
                each = grams(found, length)
                nearest = runs[np.searchsorted(runs, each).clip(max=len(runs) - 1)]
                for at in np.nonzero(nearest == each)[0].tolist():
                    here.append((length, int(each[at]), (spans[at][0], spans[at + length - 1][1])))
            texts_with.update({(length, run) for length, run, _ in here})
            shared.append(here)
        return [self._counted(here, texts_with, common) for here in shared]

    def _counted(
        self, here: list[tuple[int, int, tuple[int, int]]], texts_with: Mapping[tuple[int, int], int], common: int
    ) -> Found:
        found = Found()
        for length, run, span in here:
            if not common or texts_with[length, run] <= common:
                found.sets |= self.owners[length][run]
                found.spans.append(span)
        found.spans.sort()
        return found


def pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What is left of a text without these runs and 200 characters on both sides of each.

    Pieces shorter than 200 characters are left out; a text that falls into more than ten leaves nothing.
    """
    left: list[str] = []
    at = 0
    for start, stop in spans:
        left.append(text[at : max(at, start - AROUND)])
        at = max(at, stop + AROUND)
    left = [piece for piece in (*left, text[at:]) if len(piece) >= AROUND]
    return left if len(left) <= PIECES else []
