"""A prediction of a stage's peak memory, said before it starts, so that a run that cannot fit is seen at once."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.train.settings import TrainSettings


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def trainable(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)


def predict(
    trained: list[nn.Module],
    frozen: list[nn.Module],
    *,
    tokens: int,
    hidden: int,
    layers: int,
    intermediate: int,
    vocabulary: int,
    scored: int,
) -> int:
    """Bytes at the peak of an update.

    fp32 weights of all models; gradient and two Adam moments of what is trained (16 bytes a trained parameter in
    all, Rajbhandari et al. 2020, section 3.1, without the half-precision copies); activations that a decoder layer
    keeps for its backward pass, about (10 hidden + 4 intermediate) floats a token; logits and their gradient of the
    `scored` positions.
    """
    weights = 4 * parameters(*trained, *frozen)
    states = 12 * trainable(*trained)
    activations = 4 * tokens * layers * (10 * hidden + 4 * intermediate) * max(len(trained), 1)
    logits = 2 * 4 * scored * vocabulary
    return weights + states + activations + logits


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def statement(
    trained: list[nn.Module], frozen: list[nn.Module], model: Any, settings: TrainSettings, *, shared: int = 0
) -> str:
    """One line for people: what will be held and the predicted peak. `shared`: bytes that roles hold in common."""
    config = model.config
    peak = predict(
        trained,
        frozen,
        tokens=settings.token_budget,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        scored=settings.token_budget,
    )
    peak -= shared
    once = f", {human(shared)} of it held once for several roles" if shared else ""
    return (
        f"trains {trainable(*trained):,} of {parameters(*trained):,} parameters, {parameters(*frozen):,} frozen{once}; "
        f"predicted peak memory {human(peak)} for {settings.token_budget} tokens a pass (train.token_budget)"
    )
