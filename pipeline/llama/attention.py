"""Attention over a token forest, registered with transformers under the name "forest".

A token attends to its ancestors and, causally, to its own segment. Nothing is padded outside this file: models
work on the flat run of T tokens and only here are segments brought together. Three backends do it:

    kernel    on a CPU, in float32 and bfloat16, where kernel.c is built: every segment by itself, nothing padded
    grouped   elsewhere. Short segments are grouped into buckets of similar (query, key) length and computed by
              batched products, long ones by one call of scaled_dot_product_attention each
    dense     the reference: one block mask over all tokens

The kernel is the default and gives way to grouped where it is not usable; `forest.cache["backend"]` asks for another.
The grouping is worked out once a forest and kept in `forest.cache`.

Sizes are rounded up to few different ones (`ROWS` rows of a run, grids of members and lengths of a bucket): oneDNN
writes machine code for every new shape of a product, which takes ten times as long as the product itself.

`use_forest(model)` switches a model over; `forest_inputs(forest)` are the arguments for its forward. Without
`forest=` the same function is transformers' SDPA, so generation and padded batches go on working.

Shapes: T tokens, S segments, H query heads, K key heads, G = H / K, D head size, B segments of a bucket,
Q and N padded query and key lengths of a bucket, R gathered rows (a row is one head of one token).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.data.forest import Forest
from pipeline.llama import kernel, virtual
from pipeline.llama.options import MODEL_TYPE

NAME = "forest"
# Families whose attention has been compared with the padded computation. Others go through padding (heads.py).
TRIED = ("llama", MODEL_TYPE, "qwen2", "qwen3", "mistral")
# From this many keys on, one fused call beats a batched product (fp32 and bf16 on a CPU with 2 threads).
LONG = 384
# A run of tokens is filled up to a multiple of this before it goes through a model.
ROWS = 64
FAST = (torch.float32, torch.bfloat16)  # types that the kernel takes
BUCKET_COST = 290.0  # microseconds, see _cost
_ASIDE = ("softcap", "s_aux", "position_bias", "sinks")


@dataclass(frozen=True)
class Bucket:
    """Segments computed together. Offsets count token slots, to be multiplied by heads."""

    members: int  # B, the last of which may be empty
    queries: int  # Q
    keys: int  # N
    query_slots: np.ndarray  # [B, Q] token of each slot, -1 for padding
    key_slots: np.ndarray  # [B, N]
    mask: Tensor  # [1 or B, Q, N], 0 or -inf


@dataclass(frozen=True)
class Long:
    """A segment computed by itself."""

    segment: int
    chain: tuple[int, ...]  # ancestors from the root down, without the segment
    mask: Tensor | None  # [Q, N] bool, None where plain causality says it all


@dataclass(frozen=True)
class Plan:
    buckets: tuple[Bucket, ...]
    longs: tuple[Long, ...]
    lengths: tuple[int, ...]  # of all segments, in order of tokens
    indices: dict[Any, Indices] = field(default_factory=dict)


@dataclass(frozen=True)
class Indices:
    """Row numbers for one head layout. R rows: for each bucket its queries, keys and values, heads before slots."""

    gather_R: Tensor  # row of the flat tensor that each gathered row comes from
    out: Tensor  # [T*H] place of each token's head among the outputs of all buckets (0 for long segments)
    back: Tensor  # [rows] place of the gradient of each row of the flat tensor (own occurrence)
    add_from: Tensor | None  # gathered rows of ancestors' keys and values ...
    add_to: Tensor | None  # ... and the rows that their gradients are added to
    pads: Tensor | None  # output rows that are padding
    gather_out: Tensor  # [outputs] row of the [T*H] output that each bucket output row belongs to
    outside: Tensor | None  # rows of the flat tensor that are in no bucket (long segments, filling)


def plan(forest: Forest, window: int | None = None) -> Plan:
    """The grouping of a forest's segments, worked out once and kept in `forest.cache`."""
    key = ("attention", window)
    if key not in forest.cache:
        forest.cache[key] = _make_plan(forest, window)
    return forest.cache[key]


def _make_plan(forest: Forest, window: int | None) -> Plan:
    start, length = forest.start_S.tolist(), forest.length_S.tolist()
    parent = forest.parent_S.tolist()
    chains: list[tuple[int, ...]] = []
    for up in parent:
        chains.append(() if up < 0 else chains[up] + ((up,) if length[up] else ()))
    before = [sum(length[a] for a in chain) for chain in chains]
    short, longs = [], []
    for s, n in enumerate(length):
        if not n:
            continue
        if n + before[s] < LONG:
            short.append(s)
        else:
            longs.append(Long(s, chains[s], _long_mask(n, before[s], window, forest.ids_T.device)))
    buckets = []
    for group in _group([(before[s], length[s], s) for s in short]):
        buckets.append(_bucket(group, start, length, before, chains, window, forest.ids_T.device))
    return Plan(tuple(buckets), tuple(longs), tuple(length))


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _long_mask(n: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    if before == 0 and (window is None or n <= window):
        return None
    q = torch.arange(before, before + n, device=device)[:, None]
    return _visible(q, torch.arange(before + n, device=device)[None], window)


def _cost(members: int, prefix: int, own: int) -> float:
    """Microseconds of a bucket, forward and backward of one layer with 4 heads of 32, measured on 2 cores."""
    members, prefix, own = _rounded(members), _multiple(prefix, 16), _multiple(own, 8)
    return BUCKET_COST + members * (0.012 * own * (prefix + own) + 0.25 * (3 * own + 2 * prefix))


def _rounded(members: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: at most a third of a bucket is empty."""
    power = 1 << max(members - 1, 0).bit_length()
    return 3 * power // 4 if members <= 3 * power // 4 else power


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _group(shapes: list[tuple[int, int, int]]) -> list[list[int]]:
    """Segments (prefix, own length, number) -> groups. Cells of 8 tokens are merged while that is cheaper."""
    cells: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for prefix, own, s in shapes:
        cells.setdefault((-(-prefix // 16), -(-own // 8)), []).append((prefix, own, s))
    groups = [(max(p for p, _, _ in c), max(o for _, o, _ in c), c) for _, c in sorted(cells.items())]
    merged = True
    while merged:
        merged = False
        done: list[tuple[int, int, list[tuple[int, int, int]]]] = []
        for p, o, c in groups:
            if done:
                p0, o0, c0 = done[-1]
                # A prefix needs a mask of its own for each member: not mixed with segments that have none.
                both = _cost(len(c) + len(c0), max(p, p0), max(o, o0))
                if (p == 0) == (p0 == 0) and both < _cost(len(c), p, o) + _cost(len(c0), p0, o0):
                    done[-1] = (max(p, p0), max(o, o0), c0 + c)
                    merged = True
                    continue
            done.append((p, o, c))
        groups = done
    return [[s for _, _, s in c] for _, _, c in groups]


def _bucket(
    group: list[int],
    start: list[int],
    length: list[int],
    before: list[int],
    chains: list[tuple[int, ...]],
    window: int | None,
    device: torch.device,
) -> Bucket:
    """Keys are [ancestors | own tokens], each padded on the right."""
    prefix, own = _multiple(max(before[s] for s in group), 16), _multiple(max(length[s] for s in group), 8)
    members = _rounded(len(group))
    key_slots = np.full((members, prefix + own), -1, dtype=np.int64)
    for row, s in enumerate(group):
        at = 0
        for a in chains[s]:
            key_slots[row, at : at + length[a]] = np.arange(start[a], start[a] + length[a])
            at += length[a]
        key_slots[row, prefix : prefix + length[s]] = np.arange(start[s], start[s] + length[s])
    own_at = np.arange(own)
    positions = np.array([before[s] for s in group] + [0] * (members - len(group)))[:, None]
    q_at = positions + own_at  # [B, Q] position of each query
    k_at = np.concatenate(
        [np.where(np.arange(prefix) < positions, np.arange(prefix), 1 << 60), positions + own_at], axis=1
    )
    if prefix == 0:  # the same triangle for all members; padding stands behind every real query
        q_at, k_at = q_at[:1], k_at[:1]
    q, k = torch.from_numpy(q_at), torch.from_numpy(k_at)
    seen = _visible(q[:, :, None], k[:, None, :], window)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    return Bucket(members, own, prefix + own, key_slots[:, prefix:], key_slots, mask.to(device))


def _indices(p: Plan, tokens: int, heads: int, kv_heads: int, head_major: bool, device: torch.device) -> Indices:
    """Row numbers for a flat tensor whose rows are heads [queries H | keys K | values K] of T tokens."""
    key = (tokens, heads, kv_heads, head_major)
    if key in p.indices:
        return p.indices[key]
    width = heads + 2 * kv_heads

    def rows(slots: np.ndarray, first: int, count: int) -> np.ndarray:
        """[B, L] tokens -> [B, count, L] rows of `count` heads from head `first` on."""
        head = np.arange(first, first + count)[None, :, None]
        token = np.maximum(slots, 0)[:, None, :]
        return head * tokens + token if head_major else token * width + head

    gather, own_from, own_to, add_from, add_to = [], [], [], [], []
    out_from, out_to, pads, gather_out = [], [], [], []
    at = out_at = 0
    for b in p.buckets:
        prefix = b.keys - b.queries
        for part, (slots, first, count) in enumerate(
            [
                (b.query_slots, 0, heads),
                (b.key_slots, heads, kv_heads),
                (b.key_slots, heads + kv_heads, kv_heads),
            ]
        ):
            r = rows(slots, first, count)
            real = np.broadcast_to((slots >= 0)[:, None, :], r.shape)
            place = at + np.arange(r.size).reshape(r.shape)
            own = real.copy()
            if part:
                own[:, :, :prefix] = False
                inherited = real & ~own
                add_from.append(place[inherited])
                add_to.append(r[inherited])
            own_from.append(place[own])
            own_to.append(r[own])
            gather.append(r.ravel())
            at += r.size
        real = np.broadcast_to((b.query_slots >= 0)[:, None, :], (b.members, heads, b.queries))
        place = out_at + np.arange(real.size).reshape(real.shape)
        o = np.maximum(b.query_slots, 0)[:, None, :] * heads + np.arange(heads)[None, :, None]
        out_from.append(place[real])
        out_to.append(o[real])
        pads.append(place[~real])
        gather_out.append(o.ravel())
        out_at += real.size

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64)).to(device)

    def inverse(n: int, to: list[np.ndarray], values: list[np.ndarray]) -> Tensor:
        result = np.zeros(n, np.int64)
        if to:
            result[np.concatenate(to)] = np.concatenate(values)
        return torch.from_numpy(result).to(device)

    add, pad = tensor(add_from), tensor(pads)
    inside = np.zeros(tokens * width, dtype=bool)
    if own_to:
        inside[np.concatenate(own_to)] = True
    outside = np.flatnonzero(~inside)
    p.indices[key] = Indices(
        gather_R=tensor(gather),
        out=inverse(tokens * heads, out_to, out_from),
        back=inverse(tokens * width, own_to, own_from),
        add_from=add if add.numel() else None,
        add_to=tensor(add_to) if add.numel() else None,
        pads=pad if pad.numel() else None,
        gather_out=tensor(gather_out),
        outside=torch.from_numpy(outside).to(device) if outside.size else None,
    )
    return p.indices[key]


class _Grouped(torch.autograd.Function):
    """softmax(scale q k^T + mask) v of all buckets; one gather in, one gather out, gradients by hand.

    Written out because autograd's own chain for gather, products and softmax moves twice the memory: the gradient of
    a gather is a scattered addition, where here it is another gather (only ancestors' keys need an addition).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, p: Plan, ix: Indices, heads: int, kv: int, scale: float) -> Tensor:
        """rows [T*(H+2K), D] -> [T*H, D]; tokens of long segments get row 0, to be replaced by the caller."""
        gathered = rows.index_select(0, ix.gather_R)
        width = rows.shape[1]
        outputs = rows.new_empty(ix.gather_out.numel(), width)
        probs: list[Tensor] = []
        for b, q, k, v, o in _views(p, gathered, outputs, heads, kv):
            scores = q.new_empty(b.members * kv, q.shape[1], b.keys)
            torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
            shape = (b.members, heads, b.queries, b.keys)
            scores.view(shape).add_(b.mask[:, None])
            prob = torch.softmax(scores, -1)
            torch.bmm(prob, v, out=o)
            probs.append(prob)
        ctx.save_for_backward(gathered, *probs)
        ctx.settings = (p, ix, heads, kv, scale)
        return outputs.index_select(0, ix.out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered, *probs = ctx.saved_tensors
        p, ix, heads, kv, scale = ctx.settings
        grad_out = grad.contiguous().index_select(0, ix.gather_out)
        if ix.pads is not None:
            grad_out.index_fill_(0, ix.pads, 0.0)
        grads = torch.empty_like(gathered)
        forward = _views(p, gathered, grad_out, heads, kv)
        backward = _views(p, grads, grad_out, heads, kv)
        for prob, (_, q, k, v, do), (_, dq, dk, dv, _) in zip(probs, forward, backward, strict=True):
            torch.bmm(prob.transpose(1, 2), do, out=dv)
            dp = torch.bmm(do, v.transpose(1, 2), out=torch.empty_like(prob))
            ds = torch.ops.aten._softmax_backward_data(dp, prob, -1, prob.dtype)
            torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, ds.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        result = grads.index_select(0, ix.back)
        if ix.outside is not None:
            result.index_fill_(0, ix.outside, 0.0)
        if ix.add_from is not None and ix.add_to is not None:
            result.index_add_(0, ix.add_to, grads.index_select(0, ix.add_from))
        return result, None, None, None, None, None


def _views(p: Plan, gathered: Tensor, outputs: Tensor, heads: int, kv: int):  # type: ignore[no-untyped-def]
    """(bucket, q, k, v, o): q and o [B*K, G*Q, D], k and v [B*K, N, D], all views."""
    at = out_at = 0
    group, width = heads // kv, gathered.shape[1]
    for b in p.buckets:
        nq, nk = b.members * heads * b.queries, b.members * kv * b.keys
        q = gathered[at : at + nq].view(b.members * kv, group * b.queries, width)
        k = gathered[at + nq : at + nq + nk].view(b.members * kv, b.keys, width)
        v = gathered[at + nq + nk : at + nq + 2 * nk].view(b.members * kv, b.keys, width)
        o = outputs[out_at : out_at + nq].view(b.members * kv, group * b.queries, width)
        yield b, q, k, v, o
        at, out_at = at + nq + 2 * nk, out_at + nq


class _Turn(torch.autograd.Function):
    """Turn the pairs (2i, 2i+1) of the first heads of x [T, W, 2h] by complex factors [T, 1, h], in place.

    In place and as one complex product: a rotation needs nothing saved, and its gradient is the opposite rotation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(factors)
        ctx.heads = heads
        turn_pairs(x, factors, heads)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factors,) = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        turn_pairs(grad, factors.conj().resolve_conj(), ctx.heads)
        return grad, None, None


def turn_pairs(x: Tensor, factors: Tensor, heads: int) -> None:
    """Turn the pairs (2i, 2i+1) of the first heads of x [T, W, 2h] by complex factors [T, 1, h], in place."""
    part = x[:, :heads]
    pairs = part if part.dtype == torch.float32 else part.float()
    turned = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
    turned.mul_(factors)
    if pairs is not part:
        part.copy_(pairs)


def attend(
    rows: Tensor,
    forest: Forest,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    turn: Tensor | None = None,
    backend: str = "kernel",
) -> Tensor:
    """Attention of a forest.

    rows [T, H+2K, D] (contiguous), or [H+2K, T, D] for backend names ending in ":heads"; heads are ordered queries,
    keys, values. turn [T, 1, D/2] complex: rotary positions by which the pairs (2i, 2i+1) of queries and keys are to be
    turned; without it that is done already. Returns [T, H, D]. Rows beyond the forest's tokens are filling:
    what comes out there means nothing, and no gradient goes in.
    """
    name, _, layout = backend.partition(":")
    head_major = layout == "heads"
    if name == "kernel" and len(forest) and kernel.usable(rows.device, rows.shape[-1], rows.dtype, *FAST):
        token_major = rows.transpose(0, 1) if head_major else rows
        turns = None if turn is None else torch.view_as_real(turn).flatten(1)
        return kernel.on_forest(token_major, forest, heads, kv_heads, scale, window, turns)
    if turn is not None:
        rows = _Turn.apply(rows, turn, heads + kv_heads)
    if name == "dense":
        return _dense(rows.transpose(0, 1) if head_major else rows, forest, heads, kv_heads, scale, window)
    tokens, size = rows.shape[1 if head_major else 0], rows.shape[-1]
    p = plan(forest, window)
    ix = _indices(p, tokens, heads, kv_heads, head_major, rows.device)
    out = _Grouped.apply(rows.reshape(-1, size), p, ix, heads, kv_heads, scale) if p.buckets else None
    out = out.view(tokens, heads, size) if out is not None else None
    if not p.longs:
        return out if out is not None else rows.new_zeros(tokens, heads, size)
    return _with_longs(rows.transpose(0, 1) if head_major else rows, out, p, heads, kv_heads, scale)


def _with_longs(rows: Tensor, short: Tensor | None, p: Plan, heads: int, kv: int, scale: float) -> Tensor:
    """Replace the outputs of long segments in `short` [T, H, D] by one fused call for each."""
    lengths = [*p.lengths, len(rows) - sum(p.lengths)]  # the last is filling
    pieces = rows.split(lengths)  # one node of the graph: slices would each cost a gradient of full size
    parts = list(short.split(lengths)) if short is not None else [piece[:, :heads] for piece in pieces]
    for item in p.longs:
        own = pieces[item.segment]
        keys = torch.cat([pieces[a][:, heads:] for a in item.chain] + [own[:, heads:]]) if item.chain else None
        kv_rows = keys if keys is not None else own[:, heads:]
        result = F.scaled_dot_product_attention(
            own[:, :heads].transpose(0, 1)[None],
            kv_rows[:, :kv].transpose(0, 1)[None],
            kv_rows[:, kv:].transpose(0, 1)[None],
            attn_mask=item.mask,
            is_causal=item.mask is None,
            scale=scale,
            enable_gqa=heads != kv,
        )
        parts[item.segment] = result[0].transpose(0, 1).to(own.dtype)
    return torch.cat(parts)


def dense_mask(forest: Forest, window: int | None = None) -> Tensor:
    """[T, T] bool: which token (column) each token (row) may see."""
    key = ("dense", window)
    if key not in forest.cache:
        segments = forest.start_S.numel()
        related = torch.eye(segments, dtype=torch.bool, device=forest.ids_T.device)
        for s, up in enumerate(forest.parent_S.tolist()):
            if up >= 0:
                related[s] |= related[up]
        seg, pos = forest.segment_T, forest.positions_T
        forest.cache[key] = related[seg][:, seg] & _visible(pos[:, None], pos[None], window)
    return forest.cache[key]


def _dense(rows: Tensor, forest: Forest, heads: int, kv: int, scale: float, window: int | None) -> Tensor:
    filling = len(rows) - len(forest)
    q, k, v = (part.transpose(0, 1) for part in rows[: len(forest)].split([heads, kv, kv], dim=1))
    k, v = (x.repeat_interleave(heads // kv, dim=0) for x in (k, v))
    scores = (q @ k.transpose(1, 2)).float() * scale
    scores = scores.masked_fill(~dense_mask(forest, window), float("-inf"))
    return F.pad((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1), (0, 0, 0, 0, 0, filling))


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    forest: Forest | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: [1, H, T, D] -> [1, T, H, D]. Without `forest` it is SDPA."""
    if forest is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError("forest attention has no dropout: set attention_dropout to 0 in the model's config")
    aside = [name for name in _ASIDE if kwargs.get(name) is not None]
    if aside:
        raise ValueError(f"forest attention does not know {', '.join(aside)}: use the padded computation")
    rows = torch.cat([x[0].to(value.dtype) for x in (query, key, value)])
    out = attend(
        rows,
        forest,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        backend=forest.cache.get("backend", "kernel") + ":heads",
    )
    return out[None], None


AttentionInterface.register(NAME, forest_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_forest(model: nn.Module) -> bool:
    """Switch a transformers model (also inside a peft wrapper) to forest attention. False where it cannot be, and under
    virtual tokens, which are no part of the forest."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = model.get_base_model()  # type: ignore[operator]
        if virtual.count(model):
            return False
    config = inner.config
    if config.model_type not in TRIED or not getattr(inner, "_supports_attention_backend", False):
        return False
    if config._attn_implementation != NAME:
        inner.set_attn_implementation(NAME)
    return True


def filled(x: Tensor) -> Tensor:
    """x [N, ...] with zeros up to the next multiple of `ROWS`."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % ROWS))


def forest_inputs(forest: Forest) -> dict[str, Any]:
    """Arguments of a model's forward, which returns filling (`ROWS`) behind the forest's tokens.

    The 4-D mask is a stand-in that keeps transformers from building [T, T].
    """
    return {
        "input_ids": filled(forest.ids_T)[None],
        "position_ids": filled(forest.positions_T)[None],
        "attention_mask": torch.zeros(1, 1, 1, 1, device=forest.ids_T.device),
        "use_cache": False,
        "forest": forest,
    }
