"""AdamW, or what keeps less than its moments, with parameter groups; the learning rate as a closed form of the step.

Update numbers start at 1: update k uses the rate at k, so the first update moves and the last one reaches the
final fraction. Nothing is counted by a scheduler object, so ranks and resumes cannot disagree about it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.algo.schedule import multiplier
from pipeline.train.settings import TrainSettings

SMALL, BLOCK = 4096, 256  # elements below which 8 bits save nothing, and those that share a scale


def parameter_groups(
    module: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by decay and by learning-rate factor.

    Weight decay falls on matrices, embeddings and output head included (as LLaMA's authors and GPT-style
    codes do), and on nothing with fewer than two dimensions: no norm and no bias. `rates` multiplies the
    learning rate of parameters whose name starts with a prefix ({"value.": 2.0}); the longest prefix that
    fits wins, and one that fits nothing is a ValueError. A group remembers its `prefix`. A parameter may have a
    `rate_factor` of its own beside that (pipeline/llama/adapters.py).
    """
    rates = dict(rates or {})
    chosen: dict[tuple[float, str | None, float], list[nn.Parameter]] = {}
    used: set[str] = set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in rates if name.startswith(p)), key=len, default=None)
        used |= {prefix} if prefix is not None else set()
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        chosen.setdefault((decay, prefix, getattr(parameter, "rate_factor", 1.0)), []).append(parameter)
    if unused := rates.keys() - used:
        raise ValueError(f"no trainable parameter's name starts with {sorted(unused)}")
    if not chosen:
        raise ValueError("the module has no trainable parameter")
    return [
        {"params": parameters, "weight_decay": decay, "rate": factor * rates.get(prefix or "", 1.0), "prefix": prefix}
        for (decay, prefix, factor), parameters in chosen.items()
    ]


def adamw(module: nn.Module, settings: TrainSettings, rates: Mapping[str, float] | None = None) -> torch.optim.AdamW:
    """PyTorch's AdamW (Loshchilov & Hutter 2019), fused: four to six times faster than the others on a CPU.

    eps stands outside the square root of the bias-corrected second moment, unlike TF1's Adam.
    """
    return torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay, rates),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def optimizer(
    module: nn.Module, settings: TrainSettings, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The one that the settings name."""
    if settings.optimizer == "adamw":
        return adamw(module, settings, rates)
    groups = parameter_groups(module, settings.weight_decay, rates)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    from pipeline.llama.quantised import bnb

    # eps outside the square root, as in adamw; parameters of fewer than SMALL elements keep float32 moments
    return bnb.optim.AdamW8bit(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, min_8bit_size=SMALL
    )


def state_shapes(optimizer: Any, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What an optimiser keeps of a parameter of this shape once an update has reached it, for checkpoints."""
    own, kind, number = tuple(shape), type(optimizer).__name__, math.prod(shape)
    found: dict[str, tuple[int, ...]] = {"step": ()}
    if kind == "Adafactor":
        if len(own) < 2:
            return found | {"variance": own}
        return found | {"row_var": (*own[:-1], 1), "col_var": (*own[:-2], 1, own[-1])}
    if kind == "AdamW8bit":
        scales: dict[str, tuple[int, ...]] = {"absmax1": (-(-number // BLOCK),), "absmax2": (-(-number // BLOCK),)}
        return found | {"state1": own, "state2": own} | (scales if number >= SMALL else {})
    return found | {"exp_avg": own, "exp_avg_sq": own}


def put_state(optimizer: Any, parameter: nn.Parameter, stored: Mapping[str, torch.Tensor]) -> None:
    """Go on from what an optimiser kept of a parameter."""
    values: dict[str, Any] = {key: value.clone().to(parameter.device) for key, value in stored.items()}
    if type(optimizer).__name__ == "AdamW8bit":  # what its codes stand for, and a step that is a number
        at = next((g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
                  if p is parameter)  # fmt: skip
        optimizer.init_state(optimizer.param_groups[at[0]], parameter, *at)
        values = optimizer.state[parameter] | values | {"step": int(values["step"])}
    optimizer.state[parameter] = values


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """At least 1 where there is any warm-up, less than the whole."""
    return min(max(1, round(settings.warmup * total)), total - 1) if settings.warmup and total > 1 else 0


def cooldown_steps(settings: TrainSettings, total: int) -> int:
    """Updates at the end whose rate falls under wsd: at least 1, and none of those of the warm-up."""
    return min(max(1, round(settings.cooldown * total)), total - warmup_steps(settings, total))


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """The rate of update `step` (1 … total)."""
    factor = multiplier(
        step,
        total=total,
        warmup=warmup_steps(settings, total),
        shape=settings.schedule,
        final=settings.final_fraction,
        cooldown=cooldown_steps(settings, total),
    )
    return settings.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, held: Collection[str] = ()) -> None:
    """`held`: prefixes of `rates` whose parameters must not move now."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group.get("prefix") in held else rate * group.get("rate", 1.0)
