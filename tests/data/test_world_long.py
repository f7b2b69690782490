from __future__ import annotations

import random
import re

from pipeline.data.passkey import KEY_WORDS
from pipeline.data.world import Sizes, build_world
from pipeline.data.world_long import KEY_LENGTH, long_document


def test_a_key_is_stated_and_named_again_word_by_word_after_other_text() -> None:
    text = str(long_document(random.Random(1), 400, lambda rng: "Nothing happens.").text)
    assert 400 <= len(text.split()) < 420
    keys = re.findall(r"The pass key is ([^.]*)\.", text)
    assert len(set(keys)) == 1 and set(keys[0].split()) <= set(KEY_WORDS) and len(keys[0].split()) == KEY_LENGTH
    parts = re.split(r"The pass key is [^.]*\. ?", text)
    assert parts.pop(0) == "" and {part.count("Nothing happens.") for part in parts[:-1]} == {0, 1, 2}


def test_long_documents_leave_the_rest_of_a_world_as_it_was() -> None:
    few = dict.fromkeys(
        ("documents", "heldout_documents", "conversations", "comparisons", "heldout_pairs", "prompts"), 5
    )
    plain = build_world(0, Sizes(**few, dev=5, heldout=5))
    long = build_world(0, Sizes(**few, dev=5, heldout=5, long_documents=3, heldout_long_documents=2), long_words=50)
    assert plain.documents == long.documents and plain.judge == long.judge and not plain.long_documents
    assert len(long.long_documents) == 3 and len(long.heldout_long_documents) == 2
    assert not {d.text for d in long.long_documents} & {d.text for d in long.heldout_long_documents}
