"""What is hidden of a run of tokens and how it is laid out for one decoder: pure functions of ids and of a generator.

    whole       Thank you for inviting me to your party last week
    prefix      Thank you for inviting | me to your party last week                           loss right of the bar
    PSM         PRE Thank you SUF me to your party last week MID for inviting EOS
    SPM         PRE SUF me to your party last week MID Thank you for inviting EOS
    spans       Thank you <0> me to your party <1> week TARGETS <0> for inviting <1> last <2> EOS

PRE, SUF, MID, TARGETS and the numbered sentinels are control tokens, and so are UL2's mode tokens. A tokenizer has
those of the objective it was trained for (`control_tokens` of the settings in objectives.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

PRE, SUF, MID = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
TARGETS = "<|targets|>"  # where the input of span corruption ends: a decoder has no second stack to mark it
MODES = {"R": "<|R|>", "S": "<|S|>", "X": "<|X|>"}

Span = tuple[int, int]  # [start, stop)


def sentinel(number: int) -> str:
    """What stands for the hidden span of that number, counted from 0 in every window."""
    return f"<|span_{number}|>"


def generator(seed: int, record: int, window: int) -> random.Random:
    """The draws of one window: they depend on its record and its place there, never on what else is read."""
    return random.Random(f"{seed}/objective/{record}/{window}")


def suffix_length(n: int, share: float, draw: random.Random) -> int:
    """How many of `n` >= 2 tokens are predicted: 1 to 2 * share * n, at most n - 1, each number as likely."""
    return draw.randint(1, max(1, min(n - 1, round(2 * share * n))))


def cut_middle(n: int, draw: random.Random) -> Span:
    """The middle of `n` characters or tokens, between two places drawn independently; each part may be empty."""
    a, b = draw.randint(0, n), draw.randint(0, n)
    return min(a, b), max(a, b)


def fill_in(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], marks: tuple[int, int, int], *, spm: bool
) -> tuple[list[int], list[float]]:
    """Ids and loss weights in the order PSM or SPM, up to the middle; `marks` are PRE, SUF and MID.

    SPM is the variant that has its tokens in common with PSM (Bavarian et al. 2022): the prefix stands behind MID, next
    to the middle. The marks themselves have no loss: they are given, whatever is to be filled in.
    """
    pre, suf, mid = marks
    if spm:
        parts: list[tuple[Sequence[int], float]] = [([pre, suf], 0.0), (suffix, 1.0), ([mid], 0.0), (prefix, 1.0)]
    else:
        parts = [([pre], 0.0), (prefix, 1.0), ([suf], 0.0), (suffix, 1.0), ([mid], 0.0)]
    parts.append((middle, 1.0))
    return [i for ids, _ in parts for i in ids], [w for ids, w in parts for _ in ids]


def span_counts(n: int, density: float, mean: float) -> tuple[int, int]:
    """(hidden tokens, spans) of `n`: T5's rounding, where one token is hidden and one stays as far as there are any."""
    hidden = max(1, min(n - 1, round(n * density)))
    return hidden, max(1, min(round(hidden / mean), hidden, n - hidden))


def noise_spans(n: int, density: float, mean: float, draw: random.Random) -> list[Span]:
    """Spans to hide of `n` >= 1 tokens, as T5's random_spans_noise_mask has them.

    Kept and hidden runs alternate, the first is kept and the last is hidden; both kinds are cut into as many runs as
    there are spans, every way of cutting as likely.
    """
    hidden, spans = span_counts(n, density, mean)
    found, at = [], 0
    for kept, gone in zip(_runs(n - hidden, spans, draw), _runs(hidden, spans, draw), strict=True):
        found.append((at + kept, at + kept + gone))
        at += kept + gone
    return found


def _runs(n: int, runs: int, draw: random.Random) -> list[int]:
    """Lengths of `runs` runs, each at least 1, that add up to `n`; the number 0 is one run of length 0."""
    borders = [0, *sorted(draw.sample(range(1, n), runs - 1)), n]
    return [b - a for a, b in zip(borders, borders[1:], strict=False)]


def corrupt(ids: Sequence[int], spans: Sequence[Span], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids with a sentinel for every span, the spans behind their sentinels), as in figure 2 of Raffel et al. 2020.

    Where something stands behind the last span the targets end with one more sentinel.
    """
    inputs: list[int] = []
    targets: list[int] = []
    at = 0
    for mark, (start, stop) in zip(sentinels, spans, strict=False):
        inputs += [*ids[at:start], mark]
        targets += [mark, *ids[start:stop]]
        at = stop
    return [*inputs, *ids[at:]], targets + ([sentinels[len(spans)]] if at < len(ids) else [])
