"""KTO's reference point and steps: those of the whole batch, however it is cut, shared out or weighed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algo.preference import Kto, make_loss
from pipeline.data.forest import Group, size
from pipeline.data.groups import comparison_groups, only, rated_groups
from pipeline.data.records import Rated
from pipeline.train.loop import Trainer
from pipeline.train.preferences import PARTS, UnpairedPlan, UnpairedTrainer, imbalance, training_of
from pipeline.train.reference import held_with_reference, require_start, with_reference
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build as build_strategy
from tests.small import Listener, ask, chat, comparison, policy, same
from tests.train.ranks import ratings, train_ratings
from tests.train.test_strategy import torchrun

LOSSES = ["sigmoid", "simpo", "llama3", "kto"]


def moved(trainer: Trainer) -> None:
    """Another policy than the reference."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def made(name: str, budget: int) -> tuple[Trainer, list[Group]]:
    """A trainer whose policy has left its reference, and a batch of unequal answers with reference log-probs."""
    loss = make_loss(name)
    training = training_of(loss)
    if loss.paired:
        records: list[Any] = [comparison("q" * (i % 4 + 1), "good" * (i + 1), "bad" * (5 - i)) for i in range(5)]
    else:
        records = ratings(6)
    settings = TrainSettings(token_budget=budget, clip=0, learning_rate=1e-9, batch=8)
    strategy = build_strategy(device="cpu")
    plan = training.plan(
        training.encode(records, chat(), 99).groups, settings, seed=0, strategy=strategy, weigh=training.weigh
    )
    trainer = training.trainer(policy().module, settings, strategy, total=1, seed=0)
    groups = with_reference(trainer, plan, Listener(), training.parts) if loss.needs_reference else list(plan.groups)
    moved(trainer)
    return trainer, groups


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_how_it_was_cut(name: str) -> None:
    """T11: one micro-batch, a few, or one a record: the same loss, metrics and gradient."""
    found: list[tuple[dict[str, float], list[Tensor]]] = []
    for budget in (1000, 90, 60):
        trainer, groups = made(name, budget)
        micros = len(trainer._micros([only(g, "answer") for g in groups]))
        assert micros == 1 if budget == 1000 else micros > 1
        caught: list[Tensor] = []
        trainer.engine.update = lambda t=trainer, c=caught: c.extend(p.grad.clone() for p in t.engine.parameters)
        found.append((trainer.step(groups, training_of(make_loss(name)).weigh(groups)), caught))
    (figures, gradient), *others = found
    assert figures["loss"] != pytest.approx(0.5, abs=1e-3) and any(g.abs().max() > 1e-3 for g in gradient)
    assert name != "kto" or figures["reference_point"] > 1e-2
    for other, grads in others:
        assert {k: v for k, v in other.items() if k != "learning_rate"} == pytest.approx(
            {k: v for k, v in figures.items() if k != "learning_rate"}, rel=2e-5, abs=1e-6
        )
        for one, two in zip(gradient, grads, strict=True):
            same(two, one, atol=2e-5)


def test_a_step_by_hand() -> None:
    """z0 and loss from summed log-probs of each answer computed alone."""
    trainer, groups = made("kto", 1000)
    reference, _ = made("kto", 1000)
    fresh = policy().module

    def ratio(group: Group, fact: str) -> float:
        from pipeline.data.forest import build

        forest = build([only(group, fact)])
        with torch.no_grad():
            now, before = (module(forest).logprobs_T.sum().item() for module in (reference.module, fresh))
        return now - before

    point = max(0.0, sum(ratio(g, "unrelated") for g in groups) / len(groups))
    gains = [(1 if g[1].facts["desirable"] else -1) * (ratio(g, "answer") - point) for g in groups]
    expected = sum(1 / (1 + math.exp(0.1 * gain)) for gain in gains) / len(groups)
    figures = trainer.step(groups, {"answers": len(groups)})
    assert point > 1e-2 and figures["reference_point"] == pytest.approx(point, rel=1e-4)
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["tokens"] == sum(size(only(g, part)) for g in groups for part in PARTS)


def test_the_start_is_a_half_and_the_reference_point_zero() -> None:
    """Also with unequal weights: half of the mean weight, here of 4 desirable of 6 answers."""
    for loss, expected in ((Kto(), 0.5), (Kto(desirable_weight=2.0, undesirable_weight=0.5), 0.75)):
        strategy, settings = build_strategy(device="cpu"), TrainSettings(token_budget=60, batch=6)
        records = rated_groups(ratings(6), chat(), 99).groups
        plan = UnpairedPlan(records, settings, seed=0, strategy=strategy, weigh=training_of(loss).weigh)
        trainer = UnpairedTrainer(loss, policy().module, settings, strategy, total=1, seed=0)
        annotated = with_reference(trainer, plan, Listener(), PARTS)
        require_start(trainer, annotated, loss.start)
        found = trainer.evaluate(annotated, {"answers": 6.0})
        assert found["loss"] == pytest.approx(expected, rel=1e-7) and found["reference_point"] == 0.0
        held = held_with_reference(trainer, records, Listener(), PARTS)
        assert trainer.evaluate(held)["loss"] == pytest.approx(expected, rel=1e-7)


def test_a_plan_of_rated_answers_counts_what_is_computed() -> None:
    groups = rated_groups(ratings(6), chat(), 99).groups
    plan = UnpairedPlan(groups, TrainSettings(batch=4, epochs=2), seed=0, strategy=build_strategy(device="cpu"))
    assert plan.tokens == 2 * sum(2 * len(p.ids) + len(a.ids) + len(u.ids) for p, a, u in groups)


def test_two_ranks_take_the_same_steps_as_one(tmp_path: Any) -> None:
    """T12: 7 answers in batches of 3, 3 and 1, where one rank has none; weights, loss and reference point agree."""
    alone = train_ratings(build_strategy(device="cpu"))
    ranks = torchrun(tmp_path / "kto", 2, "ddp", "2", "ratings")
    assert [r["world"] for r in ranks] == [2, 2] and max(alone["points"]) > 1.0
    for found in ranks:
        assert found["points"] == pytest.approx(alone["points"], rel=1e-4, abs=1e-6)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, values in alone["weights"].items():
            same(found["weights"][name], values, atol=1e-5)


def test_an_uneven_share_of_ratings_is_said() -> None:
    groups = rated_groups(ratings(6), chat(), 99).groups  # 4 of 6 are desirable
    said = imbalance(Kto(), groups)
    assert said is not None and said.startswith("4 of 6 answers are desirable: they weigh 2 to 1")
    assert imbalance(Kto(undesirable_weight=1.6), groups) is None
    assert imbalance(make_loss("sigmoid"), comparison_groups([comparison("q", "a", "b")], chat(), 99).groups) is None
    all_liked = rated_groups([Rated(ask(q), "a", True) for q in "xy"], chat(), 99).groups
    assert "inf to 1" in (imbalance(Kto(), all_liked) or "")
