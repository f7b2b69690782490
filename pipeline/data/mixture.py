"""Several sources in stated shares: which documents are read how often.

mix({"web": [90, 110], "books": [50, 50]}, {"web": 1, "books": 1}, "one", seed=0)
# books once, half of the tokens of web
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

Passes = Literal["one", "several"]


def mix(
    tokens: Mapping[str, Sequence[int]], weights: Mapping[str, float], passes: Passes, seed: int
) -> list[tuple[str, int]]:
    """(source, number of the document in it), in the order in which they are read.

    tokens   of every document, by source; no source may be empty
    weights  the share of each source in the tokens, in relation to the others

    Under `one` no document is read twice: the source that is the scarcest for its weight is read once, and of the
    others as much as goes with it. Under `several` none is left out: the most plentiful one is read once, the others
    again and again. Sources follow one another as they are named, a source's passes one after another, the documents
    of a pass as they were read. A pass that does not reach the end takes documents by a draw from (seed, source, pass).
    """
    totals = {name: sum(lengths) for name, lengths in tokens.items()}
    amounts = [totals[name] / weights[name] for name in tokens]
    amount = min(amounts) if passes == "one" else max(amounts)
    chosen: list[tuple[str, int]] = []
    for name, lengths in tokens.items():
        whole, part = _whole_and_part(weights[name] * amount / totals[name])
        chosen += [(name, number) for _ in range(whole) for number in range(len(lengths))]
        chosen += [(name, number) for number in _some(lengths, part, random.Random(f"{seed}/mixture/{name}/{whole}"))]
    return chosen


def _whole_and_part(passes: float) -> tuple[int, float]:
    """A number of passes that is whole but for rounding is whole."""
    near = round(passes)
    return (near, 0.0) if abs(passes - near) < 1e-9 * max(1, near) else (int(passes), passes - int(passes))


def _some(lengths: Sequence[int], part: float, draw: random.Random) -> list[int]:
    """Documents that hold about that part of the tokens: drawn until the next one would lie outside by half or more."""
    order = list(range(len(lengths)))
    draw.shuffle(order)
    wanted, chosen = part * sum(lengths), []
    for number in order:
        if wanted < lengths[number] / 2:
            break
        wanted -= lengths[number]
        chosen.append(number)
    return sorted(chosen) if part else []
