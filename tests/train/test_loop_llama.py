"""The loop on the real core: how a batch is cut, and whether activations are recomputed, changes nothing."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.forest import Segment
from pipeline.llama.heads import PolicyModel
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.presets import ModelSettings
from pipeline.train.batches import weigh_tokens
from pipeline.train.loop import Trainer
from pipeline.train.objectives import next_token
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import Strategy, build
from tests.train.tiny import records


@pytest.fixture(scope="module")
def one() -> Strategy:
    return build(device="cpu")


def policy() -> PolicyModel:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    return PolicyModel(LlamaForCausalLM(LlamaConfig(**ModelSettings.model_validate("test").llama(97))))


def run(strategy: Strategy, **settings: object) -> list[dict[str, float]]:
    groups = [
        *records(9, longest=30),
        [Segment([5, 6, 7]), Segment([8, 9], 0, [1.0, 1.0]), Segment([10], 0, [1.0])],
    ]
    trainer = Trainer(policy(), next_token, TrainSettings(**settings), strategy, total=3, seed=0)  # type: ignore[arg-type]
    return [trainer.step(groups, weigh_tokens(groups)) for _ in range(3)]


@pytest.mark.parametrize("budget", [30, 64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cuts_and_recomputation_change_nothing(one: Strategy, budget: int, checkpointing: bool) -> None:
    whole = run(one)
    cut = run(one, token_budget=budget, checkpointing=checkpointing)
    for ours, expected in zip(cut, whole, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-5)
    assert whole[2]["loss"] < whole[0]["loss"]


def test_recomputation_really_happens(one: Strategy) -> None:
    trainer = Trainer(policy(), next_token, TrainSettings(checkpointing=True), one, total=1, seed=0)
    calls: list[int] = []
    trainer.module.lm.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    groups = records(2)
    trainer.step(groups, weigh_tokens(groups))
    assert len(calls) == 2


def test_bf16_learns_like_fp32(one: Strategy) -> None:
    full, half = run(one), run(one, precision="bf16")
    assert half[2]["loss"] == pytest.approx(full[2]["loss"], rel=2e-2)
