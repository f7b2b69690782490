"""Rotary positions: by which angles queries and keys are turned, made once when a model is built.

    rotary = new_rotary(config)
    rotary.cos_sin(positions, dtype)          [B, L, 2h] each, for rows
    rotary.factors(forest, positions)         complex [T, 1, h], for forests, once for all models of one setting

Frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`) for every type that it knows. They are no buffers: they follow
from the config.

The angle of a token depends on its position alone, under dynamic NTK too: a token at position m takes the base that
transformers takes when it decodes that token, for a length of m + 1. So a cache needs nothing recomputed, decoding
gives what a forward over the whole row gives, and no other row of a batch and no sibling in a forest changes anything.
transformers' forward over several tokens gives all of them the base of the batch's longest row instead, or of a longer
one that it saw before: up to max_position_embeddings both are the same, beyond it they are equal token by token (with
a cache), not row by row.

Shapes: B rows, L tokens of a row, T tokens of a forest, h half a head size.
Sources: Su et al. 2021 (rotary), Chen et al. 2023 (interpolation), Peng et al. 2023 (YaRN, NTK-aware and dynamic).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.data.forest import Forest
from pipeline.llama.rope_settings import NEEDED


def frequencies(config: Any) -> tuple[Tensor, float]:
    """[h] float32, and what cosines and sines are multiplied by."""
    rope, size = config.rope_parameters, config.head_dim
    kind = rope["rope_type"]
    if kind not in NEEDED:
        raise ValueError(f"rope_type {kind!r}: this core knows {', '.join(NEEDED)}")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config)
    return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)), 1.0


def positions(config: Any) -> dict[str, Any]:
    """What a config says about them, as lineage records it."""
    extra = ("truncated_basis_low", "truncated_basis_high", "truncated_basis_value", "rerope_window", "rerope_factor")
    found = {name: getattr(config, name, None) for name in ("max_position_embeddings", *extra, "rerope_trained")}
    return {"rope_parameters": dict(config.rope_parameters), **{k: v for k, v in found.items() if v}}


class Rotary:
    def __init__(self, config: Any) -> None:
        with torch.device("cpu"):  # whatever default device loading is under
            self.inverse, self.scale = frequencies(config)
        rope = sorted((name, str(value)) for name, value in config.rope_parameters.items())
        self.key = (config.head_dim, config.max_position_embeddings, *rope)

    def angles(self, positions: Tensor) -> Tensor:
        """positions [...] -> float32 [..., h]."""
        if self.inverse.device != positions.device:
            self.inverse = self.inverse.to(positions.device)
        return positions[..., None].float() * self.inverse

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, L, 2h] each."""
        with torch.autocast(positions.device.type, enabled=False):
            angles = self.angles(positions).repeat(1, 1, 2)
            return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def factors(self, forest: Forest, positions: Tensor) -> Tensor:
        """scale e^{i m theta_j} as complex64 [T, 1, h]."""
        key = ("rotary", len(positions), *self.key)
        if key not in forest.cache:
            angles = self.angles(positions)[:, None]
            forest.cache[key] = torch.polar(torch.full_like(angles, self.scale), angles)
        return forest.cache[key]


class DynamicRotary(Rotary):
    """Frequencies by position: beyond the trained length those of a base for a text that ends there."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config, self.trained = config, config.max_position_embeddings

    def angles(self, positions: Tensor) -> Tensor:
        near = super().angles(positions)
        beyond = positions >= self.trained
        if not beyond.any():
            return near
        inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, positions.device, seq_len=positions[..., None] + 1)
        return torch.where(beyond[..., None], positions[..., None].float() * inverse, near)


def new_rotary(config: Any) -> Rotary:
    return (DynamicRotary if config.rope_parameters["rope_type"] == "dynamic" else Rotary)(config)
