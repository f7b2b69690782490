"""Attention under any mask and any bias: what layers get of them in a forward, and the forest's products under them.

A `View` is what a model of `core.py` chooses when it is built; all layers share what it gives. Three of them:

    View            LLaMA's own attention, rotary positions, all tokens up to a query
    SequenceView    no rotary positions, or a window: the same products, forests included
    MaskedView      biases on scores, first tokens beside a window, prompts read as a whole: the mask is written out

Under a written mask a forest is computed by one call of scaled_dot_product_attention for each bucket of similar
segments (`attention.plan`) and each long segment; the backend "dense" is the plain formula over all tokens, as a
reference.

Shapes: B rows or segments, L queries of a row, N keys, H query heads, K key heads, D head size, T tokens of a forest
and its filling, Q padded queries of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.data.forest import Forest
from pipeline.llama import attention
from pipeline.llama.modeling import LlamaAttention, _eager, _rotate_half_split
from pipeline.llama.options.windows import Causal, Lambda, prompt_lengths

HIDDEN = torch.finfo(torch.float32).min  # finite: a row that sees nothing is padding, and must not become NaN

# --- rotary positions -------------------------------------------------------------------------------------------------


class Unturned:
    """No rotary positions."""

    def key(self, k: Tensor) -> Tensor:
        """Keys [B, K, L, D] as they lie in a cache."""
        return k

    def match(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, D], and keys [B, K, N, D] out of the cache, as their products are taken."""
        return q, k


class Turned(Unturned):
    """cos and sin [B, 1, L, D] of the queries and of the new keys."""

    def __init__(self, cos_sin: tuple[Tensor, Tensor]) -> None:
        self.own = tuple(x.unsqueeze(1) for x in cos_sin)

    def key(self, k: Tensor) -> Tensor:
        return _rotate_half_split(k, *self.own)

    def match(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _rotate_half_split(q, *self.own), k


class TurnedTwice(Turned):
    """Queries stand elsewhere for the first tokens: both turns side by side, keys with zeros in the place of one."""

    def __init__(self, own: tuple[Tensor, Tensor], capped: tuple[Tensor, Tensor], first: Tensor) -> None:
        super().__init__(own)
        self.capped = tuple(x.unsqueeze(1) for x in capped)
        self.first = first[:, None, :, None]  # [B, 1, N, 1] bool

    def match(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((_rotate_half_split(q, *self.own), _rotate_half_split(q, *self.capped)), -1)
        return both, torch.cat((k.masked_fill(self.first, 0.0), k.masked_fill(~self.first, 0.0)), -1)


Turning = Callable[[Tensor, Tensor, torch.dtype], Unturned]  # of query positions [B, L] and key positions [B, N]


def new_turning(rotary: Any, sight: Causal) -> Turning:
    if rotary is None:
        return lambda queries, keys, dtype: Unturned()
    if not isinstance(sight, Lambda):
        return lambda queries, keys, dtype: Turned(rotary.cos_sin(queries, dtype))

    def twice(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Unturned:
        own, capped = (rotary.cos_sin(at, dtype) for at in (queries, sight.capped(queries)))
        return TurnedTwice(own, capped, keys < sight.first)

    return twice


# --- rows -------------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """Positions of queries [B, L] and keys [B, N] in their rows, padding not counted, and which keys exist."""

    queries: Tensor
    keys: Tensor
    there: Tensor  # bool, broadcast to [B, L, N]


def columns(x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Columns:
    """A mask of two dimensions is the tokenizer's, over all columns up to the last query's. One of four is of the
    decoder's own cache (`decode.py`), where the column of a token is its position."""
    length = x.shape[1]
    if mask is not None and mask.ndim == 4:
        at = torch.arange(mask.shape[-1], device=x.device)[None]
        return Columns(positions, at, mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0)
    count, offset = (length, 0) if cache is None else cache.get_mask_sizes(length, 0)
    if mask is None:
        at = torch.arange(offset + count, device=x.device)[None]
        there = torch.ones_like(at[:, offset:], dtype=torch.bool)
    else:
        at = mask.long().cumsum(-1) - 1
        there = mask[:, offset:] > 0
    return Columns(at[:, -length:], at[:, offset:], there[:, None])


def row_mask(sight: Causal, bias: nn.Module, at: Columns, prompts: Tensor | None) -> Tensor:
    """float32 [B, 1 or H, L, N]: biases, and HIDDEN where nothing is seen. `prompts` [B] tokens are read as a whole."""
    queries, keys = at.queries[:, :, None], at.keys[:, None]
    prompt = torch.zeros_like(queries[:, :1]) if prompts is None else prompts[:, None, None].to(queries.device)
    hidden = ~(sight.sees(queries, keys, prompt) & at.there)
    return bias(sight.distance(queries, keys)).masked_fill(hidden[:, None], HIDDEN)


def attend_rows(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """[B, H, L, D] -> [B, L, H * D of the values], by the implementation that the config names."""
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _eager)
    dropout = module.attention_dropout if module.training else 0.0
    q, k = q.to(v.dtype), k.to(v.dtype)
    out, weights = attend(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **kwargs)
    return out.flatten(2), weights


# --- forests ----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Segments computed together: tokens of their queries [B, Q] and keys [B, N], any token where there is none."""

    queries: Tensor
    keys: Tensor
    real: Tensor  # bool [B, Q]
    there: Tensor  # bool [B, N]
    roots: bool  # segments without parents alone: key and query slots are the same


def parts(forest: Forest) -> list[Part]:
    """Those of `attention.plan`, short and long alike."""
    if "parts" not in forest.cache:
        forest.cache["parts"] = _make_parts(forest)
    return forest.cache["parts"]


def _make_parts(forest: Forest) -> list[Part]:
    start, length = forest.start_S.tolist(), forest.length_S.tolist()
    span = lambda s: np.arange(start[s], start[s] + length[s])
    plan = attention.plan(forest)
    slots = [(b.query_slots, b.key_slots) for b in plan.buckets]
    slots += [
        (span(s.segment)[None], np.concatenate([span(a) for a in (*s.chain, s.segment)])[None]) for s in plan.longs
    ]
    made = []
    for queries, keys in slots:
        q, k = (torch.from_numpy(x).to(forest.ids_T.device) for x in (queries, keys))
        made.append(Part(q.clamp(min=0), k.clamp(min=0), q >= 0, k >= 0, queries.shape == keys.shape))
    return made


class Masks(NamedTuple):
    """float32 [1 or B, 1 or H, Q, N] of each part, or of all tokens for the backend "dense"."""

    each: list[Tensor]
    learned: bool  # they have gradients, which only one of SDPA's backends gives: it is taken without them too


def forest_masks(sight: Causal, bias: nn.Module, forest: Forest) -> Masks:
    dense = forest.cache.get("backend") == "dense"
    key = ("sight", dense, sight.key)
    if key not in forest.cache:
        forest.cache[key] = [_all_tokens(sight, forest)] if dense else [_seen(sight, forest, p) for p in parts(forest)]
    masks = [bias(distance).masked_fill(hidden.unsqueeze(-3), HIDDEN) for hidden, distance in forest.cache[key]]
    return Masks(masks, learned=any(True for _ in bias.parameters()))


def _seen(sight: Causal, forest: Forest, part: Part) -> tuple[Tensor, Tensor]:
    """What is hidden [1 or B, Q, N], and distances. Roots share a triangle: their padding stands behind."""
    if part.roots and not sight.by_prompt:
        at = torch.arange(part.queries.shape[1], device=part.queries.device)[None]
        queries, keys, there = at[:, :, None], at[:, None], torch.ones_like(at[:, None], dtype=torch.bool)
        prompt = at[:, :1, None]
    else:
        queries, keys = forest.positions_T[part.queries][:, :, None], forest.positions_T[part.keys][:, None]
        there = part.there[:, None]
        prompt = prompt_lengths(forest)[forest.segment_T[part.queries[:, :1]]][:, :, None]
    return ~(sight.sees(queries, keys, prompt) & there), sight.distance(queries, keys).int()


def _all_tokens(sight: Causal, forest: Forest) -> tuple[Tensor, Tensor]:
    """The same [1, T, T] for all tokens at once: a key is there on the path of its query."""
    segments = forest.parent_S.numel()
    related = torch.eye(segments, dtype=torch.bool, device=forest.ids_T.device)
    for s, up in enumerate(forest.parent_S.tolist()):
        if up >= 0:
            related[s] |= related[up]
    of, at = forest.segment_T, forest.positions_T
    queries, keys, prompt = at[:, None], at[None], prompt_lengths(forest)[of][:, None]
    hidden = ~(sight.sees(queries, keys, prompt) & related[of][:, of])
    return hidden[None], sight.distance(queries, keys).int()[None]


def attend_forest(q: Tensor, k: Tensor, v: Tensor, forest: Forest, masks: Masks, scale: float) -> Tensor:
    """q [H, T, D], k [K, T, D], v [K, T, D'] -> [T, H * D']; zeros come out for filling."""
    only = sdpa_kernel(SDPBackend.MATH) if masks.learned else nullcontext()
    with only, torch.autocast(q.device.type, enabled=False):  # biases stay float32
        q, k, v = (x.transpose(0, 1).to(v.dtype).contiguous() for x in (q, k, v))
        attend = _plainly if forest.cache.get("backend") == "dense" else _by_parts
        return attend(q, k, v, forest, masks.each, scale).flatten(1)


def _by_parts(q: Tensor, k: Tensor, v: Tensor, forest: Forest, masks: list[Tensor], scale: float) -> Tensor:
    found, tokens = [], []
    for part, mask in zip(parts(forest), masks, strict=True):
        select = lambda x, at: x.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
        queries, keys, values = select(q, part.queries), select(k, part.keys), select(v, part.keys)
        gqa = queries.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=gqa)
        found.append(out.transpose(1, 2)[part.real])
        tokens.append(part.queries[part.real])
    result = v.new_zeros(len(q), q.shape[1], v.shape[-1])
    return result.index_copy(0, torch.cat(tokens), torch.cat(found)) if found else result


def _plainly(q: Tensor, k: Tensor, v: Tensor, forest: Forest, masks: list[Tensor], scale: float) -> Tensor:
    n, groups = len(forest), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[:n], k[:n]).float() * scale + masks[0][0]
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v[:n])
    return F.pad(out, (0, 0, 0, 0, 0, len(q) - n))


# --- attention --------------------------------------------------------------------------------------------------------


class SequenceAttention(LlamaAttention):
    """LLaMA's, its queries and keys turned or not as the view says; forests under a window, or none."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.window = config.sliding_window

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, H or K, L, D] of x [B, L, hidden], not turned."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        return tuple(project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Unturned,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.heads_of(hidden_states)
        k = position_embeddings.key(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        q, k = position_embeddings.match(q, k)
        out, weights = attend_rows(self, q, k, v, attention_mask, **kwargs)
        return self.o_proj(out), weights


class MaskedAttention(SequenceAttention):
    """The same with forests under a written mask."""

    def on_forest(  # type: ignore[override]
        self, x: Tensor, forest: Forest, position_embeddings: Unturned, masks: Masks
    ) -> Tensor:
        q, k, v = self.heads_of(x)
        q, k = position_embeddings.match(q, position_embeddings.key(k))
        return self.o_proj(attend_forest(q[0], k[0], v[0], forest, masks, self.scaling)[None])


# --- views ------------------------------------------------------------------------------------------------------------


class View:
    """LLaMA's own attention. `rotary` is None where positions are others."""

    def __init__(self, config: Any, rotary: Any, sight: Causal) -> None:
        self.config, self.rotary, self.sight = config, rotary, sight

    def on_forest(self, x: Tensor, forest: Forest, positions: Tensor, bias: nn.Module) -> dict[str, Any]:
        """What every layer gets beside its input."""
        return {"factors": None if self.rotary is None else self.rotary.factors(forest, positions)}

    def on_rows(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        bias: nn.Module,
        prompts: Tensor | None,
    ) -> dict[str, Any]:
        causal = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, position_ids=positions
        )
        return {"attention_mask": causal, "position_embeddings": self.rotary.cos_sin(positions, x.dtype)}


class SequenceView(View):
    def __init__(self, config: Any, rotary: Any, sight: Causal) -> None:
        super().__init__(config, rotary, sight)
        self.turning = new_turning(rotary, sight)

    def on_rows(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        bias: nn.Module,
        prompts: Tensor | None,
    ) -> dict[str, Any]:
        at = columns(x, positions, mask, cache)
        turns = self.turning(positions, at.keys, x.dtype)
        return {"attention_mask": row_mask(self.sight, bias, at, prompts), "position_embeddings": turns}


class MaskedView(SequenceView):
    def on_forest(self, x: Tensor, forest: Forest, positions: Tensor, bias: nn.Module) -> dict[str, Any]:
        turns = self.turning(positions[None], positions[None], x.dtype)
        return {"position_embeddings": turns, "masks": forest_masks(self.sight, bias, forest)}
