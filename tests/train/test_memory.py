"""What a PPO row says of its memory, with the models that it really opened."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pipeline.llama.adapters import LoraSettings, add_adapter, share_frozen
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.train import memory
from stages.ppo import Ppo
from tests import small


def test_what_an_adapter_leaves_frozen_is_not_trainable():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].requires_grad_(False)
    assert (memory.parameters(model), memory.trainable(model)) == (110, 10)


def test_models_are_known_by_their_modules():
    policy, scorer = small.policy(), small.scorer()
    found, scalar = memory.model_of(policy.module), memory.model_of(scorer.module)
    assert (found.parameters, found.adapter, found.scalar) == (memory.parameters(policy.module), None, False)
    assert (scalar.parameters, scalar.scalar) == (memory.parameters(scorer.module), True)


def test_models_that_share_a_base_say_so():
    lora = LoraSettings(rank=2, targets="query_value")
    one = PolicyModel(add_adapter(small.policy(seed=3).model, lora, seed=0))
    two = ScalarModel(add_adapter(small.scorer(seed=3).model, lora, seed=1))
    apart = [memory.model_of(m) for m in (one, two)]
    assert share_frozen(one, two)
    together = [memory.model_of(m) for m in (one, two)]
    assert apart[0].base != apart[1].base and together[0].base == together[1].base
    for model, module in zip(together, (one, two), strict=True):
        assert (model.adapter and model.adapter.rank) == 2
        assert model.parameters == memory.parameters(module) and model.trained == memory.trainable(module)


def test_the_statement_names_the_setting_that_decides():
    policy, reference, reward = small.policy(), small.policy(), small.scorer()
    ranks = SimpleNamespace(device=torch.device("cpu"))
    config = Ppo.Config.model_validate({"train": {"token_budget": 640}})
    trained, frozen = [policy.module], [reference.module, reward.module]
    said = memory.statement(trained, frozen, config, ranks, {}, [[1] * 8] * 4)
    held = memory.parameters(policy.module)
    assert said.startswith(f"trains {held:,} of {held:,} parameters, {memory.parameters(*frozen):,} frozen; ")
    assert said.endswith(", 640 tokens a pass (train.token_budget)")
    assert "predicted peak memory " in said and " MB while " in said
