"""The peak memory of a row's models, said before it starts, so that a run that cannot fit is seen at once.

The prediction is that of `rlhf estimate` (pipeline/estimate), with the models and lengths that are known by now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from pipeline.estimate.following import layout_of
from pipeline.estimate.memory import human, peak
from pipeline.estimate.rows import ppo_work
from pipeline.estimate.shape import Model, Shape
from pipeline.flow.launch import launch_settings
from pipeline.llama.adapter_settings import LoraSettings, settings_of
from pipeline.llama.adapters import BELOW, is_adapted
from pipeline.llama.heads import ValueHead, unwrapped
from pipeline.llama.quantise_settings import of, weights_of
from pipeline.train.strategy import Strategy


def parameters(*modules: nn.Module) -> int:
    return sum(weights_of(p) for m in modules for p in m.parameters())


def trainable(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def model_of(module: Any) -> Model:
    """A PolicyModel or ScalarModel as an estimate knows it. Models that hold one base in common have it at one address,
    which is the base's name here."""
    model = module.lm if hasattr(module, "lm") else module.classifier
    inner = unwrapped(model)
    shape = Shape.of(cast(Mapping[str, Any], inner.config.get_text_config().to_dict()))
    base = str(inner.get_input_embeddings().weight.data_ptr())
    scalar = hasattr(module, "classifier")
    if not is_adapted(model):
        return Model(shape, base, scalar=scalar)
    config = model.active_peft_config
    found = settings_of(config.to_dict()) or LoraSettings(
        rank=getattr(config, "r", 1)
    )  # of layers that are none of ours
    under = sum(p.numel() for name, p in model.named_parameters() if f".{BELOW}" in name)
    stored = config.is_prompt_learning and config.inference_mode
    return Model(shape, base, found, scalar, stored=stored, under=under, quantise=of(model))


def statement(
    trained: Sequence[nn.Module],
    frozen: Sequence[nn.Module],
    config: Any,
    ranks: Strategy,
    launch: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    shared: int = 0,
    looks: bool = False,
) -> str:
    """One line for people about a PPO row: what is held and the predicted peak of a rank. `shared`: bytes that roles
    hold in common; `looks`: whether the best weights are kept."""
    samples, new = config.sampling.samples, config.sampling.max_new_tokens
    longest, mean = max(map(len, prompts)), sum(map(len, prompts)) / len(prompts)
    work = ppo_work(
        config,
        layout_of(launch_settings(launch), config.train.precision, ranks.device.type == "cpu", config.train.optimizer),
        tuple(model_of(m) for m in trained if not isinstance(m, ValueHead)),
        tuple(map(model_of, frozen)),
        count=min(config.prompts, len(prompts)),
        columns=longest + new,
        longest=longest + samples * new,
        scored=samples * new / (mean + samples * new),
        looks=looks,
    )
    found = peak(work)
    once = f", {human(shared)} of it held once for several roles" if shared else ""
    return (
        f"trains {trainable(*trained):,} of {parameters(*trained):,} parameters, {parameters(*frozen):,} frozen{once}; "
        f"predicted peak memory {human(found.total)} while {found.phase}, {work.tokens} tokens a pass "
        "(train.token_budget)"
    )
