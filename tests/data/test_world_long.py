from __future__ import annotations

import random
import re

from pipeline.data.world import Sizes, build_world
from pipeline.data.world_long import KEYS, long_document


def test_a_key_that_is_named_again_is_the_one_that_was_stated() -> None:
    document = long_document(random.Random(1), 400, lambda rng: "Nothing happens.")
    found: dict[str, set[str]] = {}
    for name, key in re.findall(r"The (\w+) key is (\w+ \w+ \w+)\.", document.text or ""):
        found.setdefault(name, set()).add(key)
    assert len(found) == 4 and set(found) <= set(KEYS) and all(len(keys) == 1 for keys in found.values())
    assert 400 <= len((document.text or "").split()) < 410


def test_long_documents_leave_the_rest_of_a_world_as_it_was() -> None:
    few = dict.fromkeys(
        ("documents", "heldout_documents", "conversations", "comparisons", "heldout_pairs", "prompts"), 5
    )
    plain = build_world(0, Sizes(**few, dev=5, heldout=5))
    long = build_world(0, Sizes(**few, dev=5, heldout=5, long_documents=3, heldout_long_documents=2), long_words=50)
    assert plain.documents == long.documents and plain.judge == long.judge and not plain.long_documents
    assert len(long.long_documents) == 3 and len(long.heldout_long_documents) == 2
    assert not {d.text for d in long.long_documents} & {d.text for d in long.heldout_long_documents}
