from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.forest import Forest, Segment, build
from pipeline.flow.errors import NonFinite, UserError
from pipeline.train.batches import Plan, weigh_tokens
from pipeline.train.loop import LossSums, Trainer, evaluation_steps, fit
from pipeline.train.optim import learning_rate
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import Strategy
from pipeline.train.strategy import build as build_strategy
from tests.train.tiny import Listener, Tiny, next_token, records


@pytest.fixture(scope="module")
def one() -> Strategy:
    return build_strategy(device="cpu")


def trainer(
    strategy: Strategy, loss_fn: Any = next_token, total: int = 20, dropout: float = 0.0, **settings: Any
) -> Trainer:
    return Trainer(Tiny(dropout=dropout), loss_fn, TrainSettings(**settings), strategy, total=total, seed=3)


class Constant(nn.Module):
    """A weight times a given loss by token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, forest: Forest) -> torch.Tensor:
        return self.weight * forest.tokens["loss"]


def constant_loss(module: Any, forest: Forest) -> LossSums:
    return LossSums({"tokens": module(forest).sum()})


def test_two_tokens_at_2_and_eight_at_1_make_1_2(one: Strategy) -> None:
    groups = [[Segment([1] * n, tokens={"loss": [x] * n})] for n, x in ((2, 2.0), (8, 1.0))]
    settings = TrainSettings(token_budget=8, clip=0.0)
    made = Trainer(Constant(), constant_loss, settings, one, total=10, seed=0)
    figures = made.step(groups, {"tokens": 10})
    assert figures["loss"] == pytest.approx(1.2, abs=1e-12)  # the mean of means is 1.5
    assert figures["gradient_norm"] == pytest.approx(1.2, rel=1e-6)
    assert figures["tokens"] == 10


def gradient(strategy: Strategy, forests: list[Forest], weights: dict[str, float]) -> torch.Tensor:
    made = trainer(strategy, clip=0.0)
    kept: list[torch.Tensor] = []
    update = made.engine.update
    made.engine.update = lambda: kept.extend(p.grad.clone().flatten() for p in made.engine.parameters) or update()  # type: ignore[method-assign, func-returns-value]
    made.step(forests, weights)
    return torch.cat(kept)


def test_a_gradient_does_not_depend_on_how_the_batch_was_cut(one: Strategy) -> None:
    groups = records(8)
    weights = weigh_tokens(groups)
    whole = gradient(one, [build(groups)], weights)
    for parts in (2, 4, 8):
        n = 8 // parts
        cut = gradient(one, [build(groups[i : i + n]) for i in range(0, 8, n)], weights)
        assert float((cut - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("budget", [12, 24, 10_000])
def test_training_does_not_depend_on_the_token_budget(one: Strategy, budget: int) -> None:
    groups = records(10)

    def run(token_budget: int) -> tuple[list[float], torch.Tensor]:
        settings = TrainSettings(token_budget=token_budget, batch=4, epochs=3, learning_rate=1e-2)
        plan = Plan(groups, settings, seed=1, strategy=one)
        made = Trainer(Tiny(), next_token, settings, one, total=len(plan), seed=3)
        heard = Listener()
        fit(made, plan, heard)
        return [line["loss"] for line in heard.lines], made.module.head.weight.detach()

    (losses, weights), (expected, reference) = run(budget), run(64)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert float((weights - reference).norm() / reference.norm()) < 1e-5


def test_one_update_and_one_clearing_a_step_after_all_micro_batches(one: Strategy) -> None:
    made = trainer(one, token_budget=12)
    calls: list[str] = []
    for name in ("backward", "gradient_norm", "update", "clear"):
        original = getattr(made.engine, name)
        setattr(made.engine, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    groups = records(6)
    for _ in range(2):
        calls.clear()
        made.step(groups, weigh_tokens(groups))
        passes = calls.count("backward")
        assert passes > 1
        assert calls == ["backward"] * passes + ["gradient_norm", "update", "clear"]
        assert all(p.grad is None for p in made.engine.parameters)


def test_the_rate_of_every_step_is_the_closed_form(one: Strategy) -> None:
    made = trainer(one, total=5, warmup=0.4, learning_rate=0.1)
    groups = records(2)
    rates = [made.step(groups, weigh_tokens(groups))["learning_rate"] for _ in range(5)]
    assert rates == [learning_rate(made.settings, k, 5) for k in range(1, 6)]
    assert rates[:2] == [pytest.approx(0.05), pytest.approx(0.1)] and rates[4] == pytest.approx(0.01)


def test_terms_are_weighed_by_themselves(one: Strategy) -> None:
    def two_terms(module: Any, forest: Forest) -> LossSums:
        summed = -module(forest).sum()
        return LossSums({"a": summed, "b": 2 * summed})

    forest = build(records(3))
    figures = Trainer(Tiny(), two_terms, TrainSettings(), one, total=3, seed=0, coefficients={"b": 0.5}).step(
        [forest], {"a": 4.0, "b": 8.0}
    )
    assert figures["loss"] == pytest.approx(figures["loss/a"] + figures["loss/b"])
    assert figures["loss/b"] == pytest.approx(figures["loss/a"] / 2)
    with pytest.raises(ValueError, match=r"\['b'\] have no weight"):
        Trainer(Tiny(), two_terms, TrainSettings(), one, total=3, seed=0).step([forest], {"a": 1.0})


def test_a_batch_with_nothing_to_train_on_leaves_no_nan(one: Strategy) -> None:
    made = trainer(one)
    groups = [[Segment([1, 2, 3])]]
    figures = made.step(groups, weigh_tokens(groups))
    assert figures["loss"] == 0.0 and figures["gradient_norm"] == 0.0
    assert all(torch.isfinite(p).all() for p in made.module.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_at_step_7_names_it_and_leaves_the_weights_of_step_6(one: Strategy, where: str) -> None:
    def poisoned(module: Any, forest: Forest) -> LossSums:
        out = next_token(module, forest)
        loss = out.terms["tokens"]
        if made.done == 6:
            loss = loss * math.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()
        return LossSums({"tokens": loss})

    made = trainer(one, poisoned)
    groups = records(4)
    for _ in range(6):
        made.step(groups, weigh_tokens(groups))
    before = [p.detach().clone() for p in made.module.parameters()]
    with pytest.raises(NonFinite, match="step 7: .*weights are those of step 6") as failure:
        made.step(groups, weigh_tokens(groups))
    assert failure.value.exit_code == 4
    assert all(torch.equal(a, b) for a, b in zip(before, made.module.parameters(), strict=True))


def test_a_spike_changes_neither_weights_nor_moments(one: Strategy) -> None:
    """Step 7's loss is a thousand times what it was. The next step goes on as if it had not been, at its own rate."""

    def spiky(module: Any, forest: Forest) -> LossSums:
        out = next_token(module, forest)
        return LossSums({"tokens": out.terms["tokens"] * (1000.0 if made.done == 6 else 1.0)})

    made = trainer(one, spiky, skip_spikes=6.0, spike_window=8)
    groups = records(4)
    steps = [made.step(groups, weigh_tokens(groups)) for _ in range(6)]
    before = {name: tensor.detach().clone() for name, tensor in made.state().items()}
    steps.append(made.step(groups, weigh_tokens(groups)))
    after = made.state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in made.engine.parameters)
    steps.append(made.step(groups, weigh_tokens(groups)))
    assert [s["skipped"] for s in steps] == [0, 0, 0, 0, 0, 0, 1, 0]
    assert steps[6]["gradient_norm"] > 100 * steps[5]["gradient_norm"] and steps[7]["loss"] < steps[5]["loss"]
    assert [s["learning_rate"] for s in steps] == [learning_rate(made.settings, k, 20) for k in range(1, 9)]
    assert made.spikes.skipped == 1 and made.done == 8


def test_no_step_is_skipped_unless_that_is_asked_for(one: Strategy) -> None:
    made = trainer(one)
    groups = records(4)
    figures = [made.step(groups, weigh_tokens(groups)) for _ in range(3)]
    assert all("skipped" not in f for f in figures) and made.spikes.state() is None and not made.spikes.losses


def test_spikes_cannot_be_skipped_under_deepspeed() -> None:
    strategy: Any = SimpleNamespace(deepspeed=object())
    with pytest.raises(UserError, match="train.skip_spikes: DeepSpeed clears gradients in its update alone"):
        Trainer(Tiny(), next_token, TrainSettings(skip_spikes=6.0), strategy, total=3, seed=0)


def test_small_updates_move_float32_masters_under_bf16(one: Strategy) -> None:
    """Pure bfloat16 weights lose updates of 1e-6 altogether."""
    made = trainer(one, precision="bf16", learning_rate=1e-6, warmup=0.0, schedule="constant", total=100)
    groups = records(40)  # enough for every token to occur
    before = torch.cat([p.detach().flatten().clone() for p in made.module.parameters()])
    for _ in range(100):
        made.step(groups, weigh_tokens(groups))
    after = torch.cat([p.detach().flatten() for p in made.module.parameters()])
    assert after.dtype == torch.float32
    assert float((after != before).float().mean()) >= 0.99

    control = (before.abs() + 0.1).bfloat16()
    for _ in range(100):
        control += 1e-6
    assert torch.equal(control, (before.abs() + 0.1).bfloat16())


def test_bf16_computes_in_bfloat16(one: Strategy) -> None:
    seen: list[torch.dtype] = []
    made = trainer(one, precision="bf16")
    made.module.middle.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    groups = records(2)
    made.step(groups, weigh_tokens(groups))
    assert seen == [torch.bfloat16]


def test_dropout_repeats_and_changes_with_the_step(one: Strategy) -> None:
    groups = records(4)
    runs = []
    for _ in range(2):
        made = trainer(one, dropout=0.5, learning_rate=1e-9)
        runs.append([made.step(groups, weigh_tokens(groups))["loss"] for _ in range(2)])
        torch.rand(7)  # what else draws from the global generator does not matter
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_evaluation_is_exact_leaves_modes_alone_and_uses_no_dropout(one: Strategy) -> None:
    made = trainer(one, dropout=0.5, token_budget=12)
    made.module.norm.eval()
    groups = records(7)
    weights = weigh_tokens(groups)
    first, second = made.evaluate(groups, weights), made.evaluate(made.forests(groups), weights)
    assert first == second
    assert first["loss"] == pytest.approx(first["nll"]) and first["records"] != 7  # by forest, not by record
    assert made.evaluate(groups)["nll"] == first["nll"] and "loss" not in made.evaluate(groups)
    assert made.module.dropout.training and made.module.training and not made.module.norm.training


def test_prebuilt_forests_are_reused_with_their_cache(one: Strategy) -> None:
    made = trainer(one)
    forests = made.forests(records(4))
    forests[0].cache["plan"] = "kept"
    seen: list[Any] = []

    def looking(module: Any, forest: Forest) -> LossSums:
        seen.append(forest.cache.get("plan"))
        return next_token(module, forest)

    made.loss_fn = looking
    made.step(forests, {"tokens": 5.0})
    assert seen == ["kept"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_computes_what_the_next_step_computes(one: Strategy, precision: str) -> None:
    made = trainer(one, precision=precision)
    forest = made.forests(records(4))[0]
    with made.inference():
        before = made.engine(forest)
    ratios: list[torch.Tensor] = []

    def looking(module: Any, forest: Forest) -> LossSums:
        now = module(forest)
        ratios.append((now - before).exp().detach())
        return LossSums({"tokens": -now.sum()})

    made.loss_fn = looking
    made.step([forest], {"tokens": 1.0})
    assert (ratios[0] == 1.0).all()


def test_the_best_evaluation_is_kept_and_named(one: Strategy) -> None:
    groups = records(8)
    settings = TrainSettings(batch=2, evaluations=4, learning_rate=0.05)
    plan = Plan(groups, settings, seed=0, strategy=one)
    made = Trainer(Tiny(), next_token, settings, one, total=len(plan), seed=0)
    scores = iter([3.0, 1.0, 2.0, 5.0])
    states: list[torch.Tensor] = []

    def evaluate() -> dict[str, float]:
        states.append(made.module.head.weight.detach().clone())
        return {"loss": next(scores)}

    heard = Listener()
    outcome = fit(made, plan, heard, evaluate=evaluate)
    assert (outcome.kept_step, outcome.steps, outcome.kept) == (2, 4, {"loss": 1.0, "step": 2})
    assert torch.equal(made.module.head.weight, states[1]) and not torch.equal(states[1], states[3])
    assert [line["heldout/loss"] for line in heard.lines] == [3.0, 1.0, 2.0, 5.0]
    done, total, unit, figures = heard.reports[-1]
    assert done == total == plan.tokens and unit == "tokens" and figures["loss"] == heard.lines[-1]["loss"]
    assert heard.said[0].startswith("only 4 optimiser steps from 8 records")


def test_the_last_weights_stay_where_asked(one: Strategy) -> None:
    settings = TrainSettings(batch=4, evaluations=2, keep="last")
    plan = Plan(records(8), settings, seed=0, strategy=one)
    made = Trainer(Tiny(), next_token, settings, one, total=len(plan), seed=0)
    scores = iter([1.0, 2.0])
    outcome = fit(made, plan, Listener(), evaluate=lambda: {"loss": next(scores)})
    assert outcome.kept_step == 2 and outcome.kept["loss"] == 2.0


def test_an_evaluation_that_is_no_number_stops_the_run(one: Strategy) -> None:
    settings = TrainSettings(batch=4, evaluations=1)
    plan = Plan(records(8), settings, seed=0, strategy=one)
    made = Trainer(Tiny(), next_token, settings, one, total=len(plan), seed=0)
    with pytest.raises(NonFinite, match="after step 2: held-out loss is nan"):
        fit(made, plan, Listener(), evaluate=lambda: {"loss": math.nan})


def test_evaluations_are_spread_evenly_and_end_with_the_run() -> None:
    assert sorted(evaluation_steps(10, 4)) == [2, 5, 8, 10]
    assert sorted(evaluation_steps(2, 4)) == [1, 2]
    assert evaluation_steps(10, 0) == set()
