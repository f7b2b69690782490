"""Keys that a text states and asks for again: what long documents are made of, and what retrieval is measured with.

    The pass key is plum saw goat. [a long text] The pass key is       -> plum saw goat

After Mohtashami and Jaggi 2023 (section 4.2, passkey retrieval). Keys are words of the small world in place of digits,
because its tokenizer and its models are too small for many digits.

No torch, no tokenizer: texts and lists of ids.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from pipeline.data.world_text import GOODS, PETS, WORDS

QUESTION = "The pass key is"
KEY_WORDS = (*WORDS, *PETS, *GOODS)
_SENTENCE = re.compile(r"[^.!?]+[.!?]+\s*")


def draw_key(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(KEY_WORDS) for _ in range(words))


def statement(key: str) -> str:
    return f"{QUESTION} {key}."


def filler(texts: Sequence[str]) -> list[str]:
    """The sentences of texts, each with a space before it, without those that name the pass key."""
    found = [sentence.strip() for text in texts for sentence in _SENTENCE.findall(text)]
    return [f" {sentence}" for sentence in found if QUESTION not in sentence]


def hide(sentences: Sequence[Sequence[int]], needle: Sequence[int], room: int, depth: float, first: int) -> list[int]:
    """Ids of exactly `room` tokens: sentences from number `first` on, round and round, the needle between two of them.

    `depth` 0 is the beginning, 1 the end; the needle stands at the boundary of sentences that is nearest to that place.
    The last sentence is cut where the room ends. ValueError where the needle does not fit.
    """
    left = room - len(needle)
    if left < 0:
        raise ValueError(f"a needle of {len(needle)} tokens does not fit into {room}")
    text: list[int] = []
    ends = [0]
    while len(text) < left:
        text.extend(sentences[(first + len(ends) - 1) % len(sentences)])
        ends.append(min(len(text), left))
    at = min(ends, key=lambda end: abs(end - depth * left))
    return [*text[:at], *needle, *text[at:left]]
