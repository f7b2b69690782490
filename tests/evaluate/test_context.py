"""Perplexity by position and retrieval of a pass key, with models whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.forest import Forest
from pipeline.data.records import Document
from pipeline.evaluate.context import by_position, context_figures, passkey_group, passkeys, untrained_figures
from pipeline.evaluate.context_settings import ContextMeasures
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.heads import TokenOutputs
from pipeline.llama.open import Trainable
from tests.small import chat, policy

TEXT = "Mira lives in Orl. Tom has a cat. The river is long. "
DOCUMENTS = [Document(TEXT * 12), Document(TEXT * 3)]


class Fake(nn.Module):
    """Gives every token the log-prob -position / 100, and knows a key where it stands at most `reach` tokens back."""

    def __init__(self, reach: int = 10**9) -> None:
        super().__init__()
        self.reach, self.anything = reach, nn.Parameter(torch.zeros(1))

    def forward(self, forest: Forest, accuracy: bool = False) -> TokenOutputs:
        right = torch.zeros(len(forest))
        needle = chat().tokenizer(" The pass key is", add_special_tokens=False).input_ids
        for start, length in zip(forest.start_S.tolist(), forest.length_S.tolist(), strict=True):
            ids = forest.ids_T[start : start + length].tolist()
            places = [i for i in range(length) if ids[i : i + len(needle)] == needle]
            right[start : start + length] = float(places[-1] - places[0] <= self.reach) if accuracy else 0.0
        return TokenOutputs(logprobs_T=-forest.positions_T.float() / 100, correct_T=right)


def role(module: Any) -> Trainable:
    return Trainable(module, module, chat().tokenizer, chat(), None)


def measures(**changes: Any) -> ContextMeasures:
    return ContextMeasures(
        **{"max_tokens": 64, "bucket": 16, "passkey": [112, 200], "depths": 2, "trials": 3, **changes}
    )


def test_perplexity_by_position_by_hand() -> None:
    """Position p has -p / 100 nats: buckets of 16 average 1 to 15, 16 to 31 ... (a window's first token has none)."""
    found = by_position(role(Fake()), [DOCUMENTS[0]], measures(), 128)
    tokens = len(chat().documents_ids([DOCUMENTS[0]])[0])
    assert sum(b["tokens"] for b in found) == tokens - math.ceil(tokens / 64)
    assert [(b["from"], b["to"]) for b in found] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert found[0]["perplexity"] == pytest.approx(math.exp(0.08))
    assert found[1]["perplexity"] == pytest.approx(math.exp(0.235))
    assert len(by_position(role(Fake()), [Document("abcdef")], measures(), 128)) == 1  # nothing stands further back


def test_a_passkey_text_has_its_length_and_ends_with_the_key() -> None:
    sentences = [chat().tokenizer(" Mira lives.", add_special_tokens=False).input_ids]
    (segment,) = passkey_group(chat(), sentences, 3, 90, 0.5, "0/90/0.5/1")
    text = chat().tokenizer.decode(segment.ids)
    assert len(segment.ids) == 90 and segment.ids[0] == chat().bos_id
    assert text.count("The pass key is") == 2
    key = text[text.rindex("is") + 2 :]
    assert f"The pass key is{key}." in text and len(key.split()) == 3
    assert [i for i, w in enumerate(segment.weights or ()) if w] == list(range(90 - len(key), 90))
    assert passkey_group(chat(), sentences, 3, 90, 0.5, "0/90/0.5/1") == [segment]
    assert passkey_group(chat(), sentences, 3, 90, 0.5, "0/90/0.5/2") != [segment]


def test_retrieval_by_length_and_place() -> None:
    """A reader of 130 tokens finds what stands in the middle of 200 characters, not at the beginning."""
    found = passkeys(role(Fake(reach=130)), DOCUMENTS, measures(), 0, 256)
    assert [(r["length"], r["depth"], r["accuracy"]) for r in found] == [
        (112, 0.0, 1.0), (112, 0.5, 1.0), (200, 0.0, 0.0), (200, 0.5, 1.0),
    ]  # fmt: skip
    assert 1.75 < found[3]["nll"] < 2.0 and found[3]["trials"] == 3  # the last places of 200
    assert found == passkeys(role(Fake(reach=130)), DOCUMENTS, measures(), 0, 10_000)  # however it is cut up


def test_a_model_is_measured_and_under_other_positions_too() -> None:
    ours = policy()
    slower = {"rope_parameters": {"rope_type": "linear", "factor": 8}}
    given = measures(untrained={"as it is": {}, "slower": slower, "near": {"rerope_window": 8}})
    plain = context_figures(ours, DOCUMENTS, given, 0, 512)
    found = untrained_figures(ours, DOCUMENTS, given, 0, 512)
    assert found["as it is"] == plain and plain["positions"][3]["perplexity"] > 1
    assert len({found[name]["positions"][3]["perplexity"] for name in found}) == 3


@pytest.mark.parametrize("values, words", [
    ({"passkey": [16]}, "16 tokens leave no text around a key"),
    ({"passkey": [64, 64]}, "a length stands there twice"),
    ({"bukket": 3}, "did you mean 'bucket'"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_settings(ContextMeasures, values, "evaluate.context")


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="evaluate.context.passkey: 40 tokens: a needle"):
        passkeys(role(Fake()), DOCUMENTS, measures(passkey=[40]), 0, 512)
    with pytest.raises(UserError, match="no sentence to hide a pass key among"):
        passkeys(role(Fake()), [Document("no end")], measures(), 0, 512)
