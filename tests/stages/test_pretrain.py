"""The pretraining row: every objective, what its tokenizer has, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.objectives import FillIn
from pipeline.data.records import Document, Prompt
from pipeline.data.sources import write_jsonl
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.open import open_policy, open_tokenizer
from pipeline.llama.rope import positions
from pipeline.llama.rope_settings import RopeSettings
from pipeline.train.loop import Trainer
from stages.pretrain import Pretrain
from tests.small import ask
from tests.stages.conftest import Chain
from tests.stages.rows import Place, train

TEXTS = [f"{name} lives in {town} and likes {what}." for name in ("Mira", "Tom", "Ada")
         for town in ("Dovan", "Orl") for what in ("tea", "chess", "rain")]  # fmt: skip
SMALL: dict[str, Any] = {"model": {"preset": "test"}, "vocab_size": 450, "max_tokens": 64}


STILL = train(steps=1, batch_tokens=256, learning_rate=1e-12)  # weights stay
POSITIONS = [
    {"rope_parameters": {"rope_type": "yarn", "factor": 2}, "max_position_embeddings": 128},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2}},
    {"rope_parameters": {"ntk_factor": 2}},
    {"truncated_basis_high": 0.1},
    {"rerope_window": 8, "rerope_factor": 4, "rope_parameters": {"rope_theta": 500.0}},
]


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


def test_sources_are_cleaned_and_mixed(place: Place) -> None:
    """18 + 9 documents, of which one is another again and one holds a question: 18 + 7, read half and half."""
    question = "which town has a river that runs through the old mill and under its wheel"
    books = [f"a book of {number} pages says little" for number in range(7)] + [TEXTS[3], f"now, {question}!"]
    inputs = {
        "documents": documents(place),
        "more": documents(place, books),
        "evaluations": place.data("prompts", [Prompt("p", ask(question))]),
    }
    mixture = {"weights": {"documents": 1, "more.1": 1}, "passes": "several"}
    clean = {"duplicates": "near"}
    row = place.run("pretrain", inputs, mixture=mixture, clean=clean, train=train(batch_tokens=256), **SMALL)
    assert row.metrics["duplicates"] == {"exact": 1, "near": 0}
    assert row.metrics["contaminated"]["by_set"] == {"evaluations.0": 1}
    found = row.metrics["mixture"]
    assert {name: of["share"] for name, of in found.items()} == pytest.approx(
        {"documents": 0.5, "more.1": 0.5}, abs=0.02
    )
    assert min(of["passes"] for of in found.values()) == 1
    assert row.metrics["documents"] == sum(of["documents"] for of in found.values()) > 25


def test_a_row_that_was_stopped_goes_on_to_the_same_bits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mixture of denoisers and of sources, batches that grow, and steps that are skipped."""
    inputs = {"documents": documents(place), "more": documents(place, [t.lower() for t in TEXTS])}
    rule = {"batch_start": 64, "batch_growth": 1000, "skip_spikes": 0.1, "spike_window": 4, "schedule": "wsd"}
    settings: dict[str, Any] = {
        "objective": "ul2",
        "mixture": {"weights": {"documents": 2, "more.1": 1}},
        "train": train(batch_tokens=256, epochs=2, checkpoint_every=1, **rule) | {"learning_rate": 1e-4},
        **SMALL,
    }
    whole = place.run("pretrain", inputs, **settings)
    assert 0 < whole.metrics["skipped_steps"] == sum(line["skipped"] for line in whole.log) < whole.metrics["steps"]
    tokens = [line["tokens"] for line in whole.log]
    assert tokens[0] <= 64 < max(tokens) <= 256
    step = Trainer.step

    def broken(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.done == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            place.run("pretrain", inputs, again=place.root / "broken", **settings)
    again = place.run("pretrain", inputs, again=place.root / "broken", **settings)
    assert "goes on after step 5, from its checkpoint" in again.said
    assert again.out["policy"].digest == whole.out["policy"].digest
    assert again.metrics == whole.metrics


def test_a_tokenizer_that_was_trained_for_another_objective_is_refused(place: Place) -> None:
    text = documents(place)
    first = place.run("pretrain", {"documents": text}, objective="fim", train=train(), **SMALL)
    given = {"documents": text, "tokenizer": first.out["tokenizer"]}
    again = place.run("pretrain", given, objective={"name": "fim", "rate": 1}, train=train(), **SMALL)
    assert set(FillIn().control_tokens()) <= set(open_tokenizer(again.out["tokenizer"]).get_vocab())
    with pytest.raises(UserError, match=r"the tokenizer has no <\|targets\|> and 100 more"):
        place.run("pretrain", given, objective="spans", train=train(), **SMALL)


PLAN = """
sources:
  world: {kind: world, documents: 300, heldout_documents: 30, conversations: 30, comparisons: 30, heldout_pairs: 20,
          prompts: 20, dev: 10, heldout: 20}
  lists: {kind: documents, path: lists.jsonl}
rows:
  - pretrain: {documents: world.documents, more: lists, heldout: world.heldout_documents, evaluations: world.prompts}
stages:
  pretrain:
    model: {preset: test}
    vocab_size: 500
    objective: ul2
    mixture: {weights: {world: 3, lists: 1}}
    clean: {duplicates: near}
    train: {epochs: 2, batch_tokens: 2048, batch_start: 512, batch_growth: 20000, learning_rate: 0.01, schedule: wsd,
            skip_spikes: 6}
"""


@pytest.mark.slow
def test_two_processes_hide_mix_and_grow_as_one_does(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = [" ".join(draw.choice(["tea", "sea", "sun", "and", "of"]) for _ in range(40)) for _ in range(200)]
    found = []
    for name, launch in (("one", ()), ("two", ("processes=2", "strategy=ddp"))):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "plan.yaml").write_text(PLAN)
        write_jsonl(directory / "lists.jsonl", [Document(text) for text in words])
        told = [word for setting in (*launch, "threads=1", "device=cpu") for word in ("--set", f"launch.{setting}")]
        found.append(Chain(directory).run(*told)["pretrain"]["metrics"])
    one, two = found
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-5)
    same = ("documents", "windows", "windows_by_objective", "mixture", "duplicates", "contaminated", "steps", "tokens")
    assert [two[name] for name in same] == [one[name] for name in same]
    assert one["mixture"]["lists"]["share"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("context", POSITIONS, ids=lambda c: "-".join(c))
def test_a_row_goes_on_from_another_at_other_positions(place: Place, context: dict[str, Any]) -> None:
    text = documents(place)
    start = place.run("pretrain", {"documents": text}, train=train(epochs=1, batch_tokens=256), **SMALL)
    given = {"documents": text, "policy": start.out["policy"]}
    row = place.run("pretrain", given, context=context, max_tokens=128, train=STILL)
    after, weights = (open_policy(r.out["policy"]).model for r in (row, start))
    config, before, facts = after.config, weights.config, row.out["policy"].lineage
    rope = dict(before.rope_parameters)
    assert facts["positions_before"] == {"max_position_embeddings": 2048, "rope_parameters": rope}
    assert facts["positions"] == positions(config) != positions(before)
    assert config.rope_parameters == (
        RopeSettings(**context["rope_parameters"]).parameters(1e4, 2048, 8)
        if "rope_parameters" in context else before.rope_parameters
    )  # fmt: skip
    assert row.out["tokenizer"].lineage == start.out["tokenizer"].lineage
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(after.parameters(), weights.parameters(), strict=True))


def test_a_row_goes_on_as_it_was(place: Place) -> None:
    text = documents(place)
    start = place.run("pretrain", {"documents": text}, train=train(epochs=1, batch_tokens=256), **SMALL)
    given = {"documents": text, "policy": start.out["policy"]}
    row = place.run("pretrain", given, max_tokens=64, train=STILL)
    before, after = (open_policy(r.out["policy"]).model for r in (start, row))
    same = ({**m.config.to_dict(), "_name_or_path": ""} for m in (before, after))
    assert next(same) == next(same)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "given", "words"),
    [
        (
            {"context": {"max_position_embeddings": 64}},
            set(),
            "pretrain.context changes the model",
        ),
        ({}, {"policy", "tokenizer"}, "pretrain.tokenizer: the policy"),
        (
            {"model": {"positions": "learned", "max_position_embeddings": 64}},
            set(),
            "pretrain.max_tokens: 512, but the model learns 64 positions",
        ),
    ],
)
def test_what_does_not_go_with_a_start_is_refused(config: dict[str, Any], given: set[str], words: str) -> None:
    settings = parse_settings(Pretrain.Config, config, "pretrain")
    with pytest.raises(UserError, match=words):
        Pretrain.check(settings, frozenset({"documents", *given}))


def test_positions_that_cannot_be_changed_are_refused(place: Place) -> None:
    words = "max_position_embeddings is what rope_type dynamic takes for the trained length"
    dynamic = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2}}
    with pytest.raises(UserError, match=words):
        parse_settings(Pretrain.Config, {"context": dynamic}, "pretrain")
    text = documents(place)
    start = place.run("pretrain", {"documents": text}, train=train(steps=1, batch_tokens=256), **SMALL)
    given = {"documents": text, "policy": start.out["policy"]}
    context = {"rerope_window": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 2}}
    with pytest.raises(UserError, match="context: rerope_window needs frequencies that do not change"):
        place.run("pretrain", given, context=context, train=train(steps=1, batch_tokens=256))
