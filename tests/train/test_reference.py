"""The reference's log-probs: the starting policy's own, to the bit, whatever the order of the records."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.algo.preference import make_loss
from pipeline.data.forest import Forest, build
from pipeline.data.groups import comparison_groups, continuations, rated_groups
from pipeline.data.records import Rated
from pipeline.flow.errors import RowFailed
from pipeline.llama.adapters import LoraSettings, add_adapter
from pipeline.llama.heads import PolicyModel, TokenOutputs
from pipeline.train.batches import Plan
from pipeline.train.loop import Trainer
from pipeline.train.objectives import preference, weigh_answers, weigh_pairs
from pipeline.train.reference import held_with_reference, require_start, with_reference, without_dropout
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import build as build_strategy
from tests.small import Listener, ask, chat, comparison, outputs, policy
from tests.train.tiny import Tiny

LN2 = math.log(2)
SETTINGS = {"learning_rate": 1e-2, "batch": 3, "token_budget": 64, "warmup": 0.0}
SIGMOID = make_loss("sigmoid")
LOSS = preference(SIGMOID)


def groups(n: int = 7):
    records = [comparison(f"question {i}", "good" + "!" * i, "bad") for i in range(n)]
    return comparison_groups(records, chat(), 99).groups


def make(module: nn.Module, records, **settings: Any) -> tuple[Trainer, Plan]:
    chosen = TrainSettings(**{**SETTINGS, **settings})
    strategy = build_strategy(device="cpu")
    plan = Plan(records, chosen, seed=0, strategy=strategy, weigh=weigh_pairs("pair"))
    return Trainer(module, LOSS, chosen, strategy, total=len(plan), seed=0), plan


def references(records) -> list[list[float]]:
    return [[s.facts["reference"] for s in group[1:]] for group in records]


class WithDropout(Tiny):
    """A small policy with dropout, as one that a stage starts from may have."""

    def forward(self, forest: Forest, **_: Any) -> TokenOutputs:  # type: ignore[override]
        return TokenOutputs(logprobs_T=super().forward(forest) * (forest.weights_T > 0))


def tiny_groups(n: int = 6):
    facts = [{"answer": 1.0, "worth": 1.0}, {"answer": 1.0, "worth": 0.0}]
    return [continuations([1 + i], [[2, 3 + i], [4 + i]], facts) for i in range(n)]


def test_the_first_loss_is_ln_2_and_training_moves_it():
    trainer, plan = make(policy().module, groups())
    annotated = with_reference(trainer, plan, Listener())
    first = Plan(annotated, trainer.settings, seed=0, strategy=trainer.strategy, weigh=weigh_pairs("pair"))
    require_start(trainer, first.batch(0).groups, SIGMOID.start)
    batch = first.batch(0)
    figures = trainer.step(batch.groups, batch.weights)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7) and figures["margin"] == 0.0
    later = trainer.step(batch.groups, batch.weights)
    assert later["loss"] < math.log(2) - 1e-3 and later["margin"] > 0
    with pytest.raises(RuntimeError, match="before the first update"):
        with_reference(trainer, plan, Listener())


def test_another_reference_is_refused():
    trainer, plan = make(policy().module, groups())
    annotated = with_reference(trainer, plan, Listener())
    with torch.no_grad():
        next(trainer.module.parameters()).mul_(1.05)
    with pytest.raises(RowFailed, match="policy and reference are not the same"):
        require_start(trainer, annotated[:3], SIGMOID.start)


@pytest.mark.parametrize(("name", "expected"), [("ipo", 25.0), ("hinge", 1.0), ("apo_zero", 1.0), ("llama3", LN2)])
def test_every_known_start_is_asserted(name: str, expected: float):
    """The right reference passes, one that is 5 % off does not, and where nothing is known nothing is asked."""
    loss = make_loss(name)
    trainer, plan = make(policy().module, groups())
    trainer.loss_fn = preference(loss)
    annotated = with_reference(trainer, plan, Listener())
    assert trainer.evaluate(annotated[:3])["loss"] == pytest.approx(expected, rel=2e-7)
    require_start(trainer, annotated[:3], loss.start)
    with torch.no_grad():
        next(trainer.module.parameters()).mul_(1.05)
    with pytest.raises(RowFailed, match=f"expected {expected:.9g}"):
        require_start(trainer, annotated[:3], loss.start)
    require_start(trainer, annotated[:3], make_loss("simpo").start)


def test_parts_are_taken_apart_each_as_it_is_trained():
    """Two parts: answers (2 groups together, so -2 a token) never share a pass with unrelated ones (the same)."""
    records = rated_groups([Rated(ask(q), a, True) for q, a in (("x", "yes"), ("y", "no"))], chat(), 99).groups
    strategy = build_strategy(device="cpu")
    plan = Plan(records, TrainSettings(**SETTINGS), seed=0, strategy=strategy, weigh=weigh_answers)
    trainer = Trainer(Company(), LOSS, plan_settings := TrainSettings(**SETTINGS), strategy, total=1, seed=0)
    assert plan_settings.batch == 3
    annotated = with_reference(trainer, plan, Listener(), ("answer", "unrelated"))
    assert references(annotated) == [[-2.0 * 4, -2.0 * 3], [-2.0 * 3, -2.0 * 4]]
    assert all(group[0].facts["reference"] == 0.0 for group in annotated)
    without = with_reference(trainer, plan, Listener(), ("answer",))
    assert references(without) == [[-8.0, 0.0], [-6.0, 0.0]]


def test_dropout_does_not_reach_the_reference():
    """T28: taken without dropout and without gradient, modes as before; with p = 0 the first step is ln 2 too."""
    trainer, plan = make(WithDropout(dropout=0.3), tiny_groups())
    again, _ = make(WithDropout(dropout=0.0), tiny_groups())
    annotated = with_reference(trainer, plan, Listener())
    assert trainer.module.training and trainer.module.dropout.training
    assert references(annotated) == references(with_reference(again, plan, Listener()))
    require_start(trainer, annotated, SIGMOID.start)
    batch = Plan(annotated, trainer.settings, seed=0, strategy=trainer.strategy, weigh=weigh_pairs("pair")).batch(0)
    assert without_dropout(trainer.module) and not without_dropout(trainer.module)
    assert trainer.module.training
    assert trainer.step(batch.groups, batch.weights)["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_dropout_of_adapters_and_of_attention_is_found():
    role = policy()
    role.model.model.layers[1].self_attn.attention_dropout = 0.1
    module = PolicyModel(add_adapter(role.model, LoraSettings(rank=2, dropout=0.2), seed=0)).train()
    assert without_dropout(module) and not without_dropout(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    forest = build([continuations([1, 2], [[3, 4]])])
    assert torch.equal(module(forest).logprobs_T, module(forest).logprobs_T)
    assert module.lm.peft_config["default"].lora_dropout == 0.2  # what is saved keeps its setting


def test_values_stay_with_their_records_in_any_order():
    """T31: a shuffled data set gives every record the value that it had."""
    records = groups()
    order = [4, 0, 6, 2, 5, 1, 3]
    found = []
    for given in (records, [records[i] for i in order]):
        trainer, plan = make(policy().module, given)
        found.append(references(with_reference(trainer, plan, Listener())))
    for place, i in enumerate(order):
        assert found[1][place] == pytest.approx(found[0][i], abs=1e-5)
    assert len({x for pair in found[0] for x in pair}) == 14  # all differ, so a swap would show


class Company(nn.Module):
    """Log-probs that tell how many records were computed together: rounding does the same in small."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, forest: Forest) -> Any:
        return outputs(logprobs_T=-self.weight * float(forest.groups) * forest.weights_T)


def test_a_record_keeps_the_value_of_the_micro_batch_that_first_trains_it():
    """Batches of 3 over 4 records: the second holds one new record and two that were seen before."""
    trainer, plan = make(Company(), tiny_groups(4), epochs=2.0)
    plan.steps[:] = [[0, 1, 2], [3, 0], [1, 2, 3]]
    assert references(with_reference(trainer, plan, Listener())) == [[-6.0, -3.0]] * 3 + [[-4.0, -2.0]]


def test_records_that_are_never_trained_get_nothing():
    trainer, plan = make(policy().module, groups(), steps=1)
    annotated = with_reference(trainer, plan, Listener())
    reached = set(plan.steps[0])
    assert [any(pair) for pair in references(annotated)] == [i in reached for i in range(7)]


def test_held_out_records_have_theirs():
    trainer, _ = make(policy().module, groups())
    held = held_with_reference(trainer, groups(3), Listener())
    assert sorted(len(g[1].ids) for g in held) == [5, 6, 7] and all(x < 0 for pair in references(held) for x in pair)
    assert trainer.evaluate(held)["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_a_rank_makes_as_many_passes_as_the_busiest(monkeypatch):
    """Sharded weights are gathered in every pass: a rank with less work goes on with a filler that changes nothing."""
    records, module = groups(), policy().module
    trainer, plan = make(module, records)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    alone = references(with_reference(trainer, plan, Listener()))
    own, gather = len(calls), trainer.strategy.gather
    busier = lambda said: [
        {**rank, "passes": rank["passes"] + 2} if "passes" in rank else rank for rank in gather(said)
    ]
    monkeypatch.setattr(type(trainer.strategy), "gather", lambda self, said: busier(said))
    again = references(with_reference(trainer, plan, Listener()))
    assert len(calls) - own > own and again == alone
