"""The pretraining row: every objective, what its tokenizer has, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.objectives import FillIn
from pipeline.data.records import Document
from pipeline.flow.errors import UserError
from pipeline.llama.open import open_tokenizer
from tests.stages.rows import Place, train

TEXTS = [f"{name} lives in {town} and likes {what}." for name in ("Mira", "Tom", "Ada")
         for town in ("Dovan", "Orl") for what in ("tea", "chess", "rain")]  # fmt: skip
SMALL: dict[str, Any] = {"model": {"preset": "test"}, "vocab_size": 450, "max_tokens": 64}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def documents(place: Place, texts: list[str] = TEXTS) -> Any:
    return place.data("documents", [Document(text) for text in texts])


@pytest.mark.parametrize(
    ("objective", "kinds", "more"),
    [
        ("causal", None, 0),
        ("prefix", None, 0),
        ("fim", {"left to right", "psm", "spm"}, 3),
        ("spans", {"spans"}, 101),
        ("ul2", {"R", "S", "X"}, 104),
    ],
)
def test_every_objective_learns(place: Place, objective: str, kinds: set[str] | None, more: int) -> None:
    text = documents(place)
    row = place.run(
        "pretrain",
        {"documents": text, "heldout": text},
        objective=objective,
        train=train(epochs=4, batch_tokens=256),
        **SMALL,
    )
    losses = [line["loss"] for line in row.log]
    assert losses[-1] < losses[0] and row.metrics["heldout_loss"] < losses[0]
    assert row.metrics["windows"] == len(TEXTS)
    made = row.metrics.get("windows_by_objective")
    assert made is None if kinds is None else set(made) == kinds and sum(made.values()) == len(TEXTS)
    assert len(open_tokenizer(row.out["tokenizer"]).all_special_tokens) == 8 + more


def test_a_tokenizer_that_was_trained_for_another_objective_is_refused(place: Place) -> None:
    text = documents(place)
    first = place.run("pretrain", {"documents": text}, objective="fim", train=train(), **SMALL)
    given = {"documents": text, "tokenizer": first.out["tokenizer"]}
    again = place.run("pretrain", given, objective={"name": "fim", "rate": 1}, train=train(), **SMALL)
    assert set(FillIn().control_tokens()) <= set(open_tokenizer(again.out["tokenizer"]).get_vocab())
    with pytest.raises(UserError, match=r"the tokenizer has no <\|targets\|> and 100 more"):
        place.run("pretrain", given, objective="spans", train=train(), **SMALL)
