"""Long documents of the small world: its texts one after another, and keys that are stated and named again later.

What a key is can only be known from the document, at any distance, so a model that reads far predicts more.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pipeline.data import world_text as text
from pipeline.data.passkey import PASS, draw_key, statement
from pipeline.data.records import Document

KEYS = (PASS, *text.COLOURS[:3])
KEY_LENGTH = 3  # words
STATED, NAMED = 0.35, 0.6  # shares of new keys and of keys named again; the rest, little, is text


def long_document(rng: random.Random, words: int, write: Callable[[random.Random], str]) -> Document:
    """At least `words` words. `write` gives a short text of the world."""
    said: list[str] = []
    known: dict[str, str] = {}
    length = 0
    while length < words:
        kind = rng.random()
        if kind < STATED and len(known) < len(KEYS):
            name = rng.choice([k for k in KEYS if k not in known])
            known[name] = draw_key(rng, KEY_LENGTH)
            said.append(statement(name, known[name]))
        elif kind < STATED + NAMED and known:
            name = rng.choice(sorted(known))
            said.append(statement(name, known[name]))
        else:
            said.append(write(rng))
        length += said[-1].count(" ") + 1
    return Document(text=" ".join(said))
