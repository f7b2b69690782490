"""Long documents of the small world: its texts one after another, and between them a pass key, named again and again.

What the key is can only be known from the document, at any distance, so a model that reads far predicts more.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pipeline.data.passkey import draw_key, statement
from pipeline.data.records import Document

KEY_LENGTH = 3  # words
BETWEEN = (0, 1, 1, 2)  # texts between two mentions, each as likely


def long_document(rng: random.Random, words: int, write: Callable[[random.Random], str]) -> Document:
    """At least `words` words. `write` gives a short text of the world."""
    mention = statement(draw_key(rng, KEY_LENGTH))
    said: list[str] = []
    length = 0
    while length < words:
        new = [mention, *(write(rng) for _ in range(rng.choice(BETWEEN)))]
        length += sum(text.count(" ") + 1 for text in new)
        said += new
    return Document(text=" ".join(said))
