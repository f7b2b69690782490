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

from collections.abc import Iterator
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
        """Positions of keys [B, N], and their turns within the window and beyond it."""
        if count not in self._keys:
            at = self._key_positions(count, cache)
            self._keys[count] = (at, self._turn(at), self._turn(at.float() * self.leak))
        return self._keys[count]

    def _key_positions(self, count: int, cache: Cache | None) -> Tensor:
        """[B, N]. Keys of a cache stand in order: in our own from the first column on (`decode.SlotCache`), in others
        up to the last query, behind the row's padding."""
        if count == self.positions.shape[1]:
            return self.positions
        at = torch.arange(count, device=self.positions.device)[None]
        return at if hasattr(cache, "slots_PK") else at - (count - 1 - self.positions[:, -1:])


class RectifiedRotary:
    """Stands where a `Rotary` does."""

    def __init__(self, rotary: rope.Rotary, config: Any) -> None:
        self.rotary, self.config = rotary, config
        self.key = (*rotary.key, config.rerope_window, config.rerope_factor, config.rerope_trained)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> Any:
        return Rectified(self.rotary, self.config, positions)

    def factors(self, forest: Forest, positions: Tensor) -> Any:
        key = ("rectified", *self.key, len(positions))
        if key not in forest.cache:
            forest.cache[key] = Rectified(self.rotary, self.config, positions[None])
        return forest.cache[key]


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
        at = turns.keys(k.shape[2], past_key_values)
        near_q, far_q, near_k, far_k, v = self._turned(turns, q, k, v, *at)
        distance = turns.positions[:, None, :, None] - at[0][:, None, None]
        scores = torch.where(distance < turns.window, near_q @ near_k, far_q @ far_k)
        weights = _masked(scores, attention_mask, distance).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(out.to(hidden_states.dtype)), weights

    def _turned(self, turns: Rectified, q: Tensor, k: Tensor, v: Tensor, _: Tensor, near: Any, far: Any) -> Any:
        """Queries [B, H, L, D], scaled, and keys [B, H, D, N], turned for both distances; values [B, H, N, D]."""
        k, v = (x.float().repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
        q = q.float() * (self.scaling if turns.growth is None else self.scaling * turns.growth)
        queries = (_rotate_half_split(q, *turn) for turn in turns.queries)
        return *queries, *(_rotate_half_split(k, *turn).transpose(2, 3) for turn in (near, far)), v

    def on_forest(self, x: Tensor, factors: Any, forest: Forest) -> Tensor:
        """x [1, T, D] -> [1, T, D], tree by tree."""
        shape, tokens = (1, x.shape[1], -1, self.head_dim), x.shape[1]
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        at = factors.keys(tokens, None)
        near_q, far_q, near_k, far_k, values = self._turned(factors, q, k, v, *at)
        parts = []
        for part, seen in _trees(forest):
            scores = near_q[..., part, :] @ near_k[..., part]
            positions = forest.positions_T[part]
            if int(positions.max()) >= factors.window:
                near = positions[:, None] - positions < factors.window
                scores = torch.where(near, scores, far_q[..., part, :] @ far_k[..., part])
            parts.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values[..., part, :])
        filling = values.new_zeros(1, self.heads, tokens - len(forest), self.head_dim)
        out = torch.cat((*parts, filling), 2).transpose(1, 2).reshape(1, tokens, -1)
        return self.o_proj(out.to(x.dtype))


def _trees(forest: Forest) -> list[tuple[slice, Tensor]]:
    """The tokens of each group, and which of them [n, n] each of them sees."""
    if "trees" not in forest.cache:
        forest.cache["trees"] = list(_each_tree(forest))
    return forest.cache["trees"]


def _each_tree(forest: Forest) -> Iterator[tuple[slice, Tensor]]:
    counts = torch.bincount(forest.group_S, minlength=forest.groups).tolist()
    first = 0
    for count in counts:
        own = slice(first, first + count)
        related = torch.eye(count, dtype=torch.bool, device=forest.ids_T.device)
        for s, up in enumerate(forest.parent_S[own].tolist()):
            if up >= 0:
                related[s] |= related[up - first]
        begin, tokens = int(forest.start_S[first]), int(forest.length_S[own].sum())
        part = slice(begin, begin + tokens)
        segment, positions = forest.segment_T[part] - first, forest.positions_T[part]
        if tokens:
            yield part, related[segment][:, segment] & (positions <= positions[:, None])
        first += count


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
