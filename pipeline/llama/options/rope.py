"""Rotary positions that transformers does not have: a truncated basis, and distances rectified beyond a window.

Truncated basis (Pal et al. 2023, "Giraffe"; `truncate_frequency` in abacusai/Long-Context): a pair that turns by
theta_i radians a token goes on doing so where theta_i >= high, turns by one small value where low < theta_i < high, and
stands still where theta_i <= low, so that no pair ever shows an angle that training did not.

ReRoPE and leaky ReRoPE (Su 2023, kexue.fm/archives/9708; bojone/rerope): a query at distance d of a key is turned by d
below the window w, by w beyond it, or in the leaky form by w + (d - w) / factor. Two products of queries and keys in
place of one; keys lie in the cache as they are, not turned, so its size is that of plain attention.

Shapes: B rows, L queries, N keys, H query heads, D head size, h half of it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pipeline.data.forest import Forest
from pipeline.llama import rope
from pipeline.llama.modeling import LlamaAttention, _rotate_half_split


def truncated(inverse: Tensor, low: float, high: float, value: float) -> Tensor:
    slow = torch.where(inverse > low, value, 0.0)
    return torch.where(inverse >= high, inverse, slow)


class TruncatedRotary(rope.Rotary):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        bounds = config.truncated_basis_low, config.truncated_basis_high, config.truncated_basis_value
        self.inverse = truncated(self.inverse, *bounds)
        self.key = (*self.key, *bounds)


class Rectified:
    """What the queries of one forward are turned by, and the keys once it is known how many there are."""

    def __init__(self, rotary: Any, config: Any, positions: Tensor) -> None:
        self.rotary, self.positions = rotary, positions
        self.window, self.leak = config.rerope_window, 1.0 / (config.rerope_factor or float("inf"))
        self.trained = config.rerope_trained
        self._keys: dict[int, tuple[Any, ...]] = {}

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary.cos_sin(positions, torch.float32)
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @cached_property
    def queries(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines [B, 1, L, D] within the window and beyond it."""
        beyond = self.window + (self.positions.float() - self.window) * self.leak
        return self._turn(self.positions), self._turn(beyond)

    @cached_property
    def growth(self) -> Tensor | None:
        """[B, 1, L, 1] max(1, log of the number of tokens / log of the trained length), which queries are scaled by."""
        if self.trained is None:
            return None
        grown = (self.positions + 1).float().log() / torch.tensor(float(self.trained)).log()
        return grown.clamp(min=1.0)[:, None, :, None]

    def keys(self, count: int, cache: Cache | None) -> tuple[Any, ...]:
        """The turns of keys within the window and beyond it, and the distances [B, 1, L, N]."""
        if count not in self._keys:
            at = self._key_positions(count, cache)
            distance = self.positions[:, :, None] - at[:, None]
            self._keys[count] = (self._turn(at), self._turn(at.float() * self.leak), distance[:, None])
        return self._keys[count]

    def _key_positions(self, count: int, cache: Cache | None) -> Tensor:
        """[B, N]. Keys of a cache stand in order: in our own from the first column on (`decode.SlotCache`), in others
        up to the last query, behind the row's padding."""
        if count == self.positions.shape[1]:
            return self.positions
        at = torch.arange(count, device=self.positions.device)[None]
        return at if hasattr(cache, "slots_PK") else at - (count - 1 - self.positions[:, -1:])


class RectifiedRotary:
    """Stands where a `Rotary` does; no forest is computed with it (`attention.use_forest`)."""

    def __init__(self, rotary: rope.Rotary, config: Any) -> None:
        self.rotary, self.config = rotary, config

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> Any:
        return Rectified(self.rotary, self.config, positions)

    def factors(self, forest: Forest, positions: Tensor) -> Tensor:
        raise ValueError("distances beyond a window are rectified row by row: use the padded computation")


class RectifiedAttention(LlamaAttention):
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Rectified,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, L, D] -> [B, L, D] and the weights, by the plain formula under every implementation."""
        turns, shape = position_embeddings, (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        near_q, far_q = turns.queries
        near_k, far_k, distance = turns.keys(k.shape[2], past_key_values)
        q, k, v = q.float(), k.float().repeat_interleave(self.num_key_value_groups, 1), v.float()
        if turns.growth is not None:
            q = q * turns.growth
        scores = _rotate_half_split(q, *near_q) @ _rotate_half_split(k, *near_k).transpose(2, 3)
        far = _rotate_half_split(q, *far_q) @ _rotate_half_split(k, *far_k).transpose(2, 3)
        scores = torch.where(distance < turns.window, scores, far) * self.scaling
        scores = _masked(scores, attention_mask, distance)
        weights = scores.softmax(-1)
        out = weights @ v.repeat_interleave(self.num_key_value_groups, 1)
        out = out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1).to(hidden_states.dtype)
        return self.o_proj(out), weights


def _masked(scores: Tensor, mask: Tensor | None, distance: Tensor) -> Tensor:
    """By transformers' mask: additive, boolean, or none where causality says it all."""
    if mask is None:
        return scores.masked_fill(distance < 0, torch.finfo(scores.dtype).min)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def new_rotary(config: Any) -> Any:
    rotary = TruncatedRotary(config) if config.truncated_basis_high else rope.new_rotary(config)
    return RectifiedRotary(rotary, config) if config.rerope_window else rotary
