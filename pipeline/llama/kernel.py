"""The Python side of kernel.c: attention over a forest and one step of decoding, on a CPU.

Built when the package is installed, where there is a C compiler; without it, on other devices and for other types
the same is computed by PyTorch's products, more slowly (`attention.py`, `decode.py`). `usable` says which it will be.
Every function runs on as many threads as PyTorch does and gives the same bits on any number of them.

Shapes: T tokens, H query heads, K key heads, D head size, N sequences of a step, R rows and C columns of a cache,
P prompts, S samples of each.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.data.forest import Forest

VERSION = 1  # of the functions' arguments, the same as in kernel.c
LANES = 16  # columns of a cache come in multiples of this
LARGEST = 256  # head size

_INT, _LONG, _POINTER, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@cache
def library() -> Any:
    """The compiled code, or None. Loaded after torch, so that both share one OpenMP runtime and its threads."""
    spec = importlib.util.find_spec("pipeline.llama._kernel")
    if spec is None or spec.origin is None:
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        if found.rlhf_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    found.rlhf_forest.argtypes = [_POINTER] * 4 + [_LONG] * 4 + [_INT] * 4 + [_FLOAT, _INT] + [_POINTER] * 5
    found.rlhf_decode.argtypes = [_LONG] * 2 + [_INT] * 4 + [_FLOAT, _INT] + [_POINTER] * 7
    found.rlhf_store.argtypes = [_LONG] * 3 + [_INT] * 4 + [_POINTER] * 6
    return found


def usable(device: torch.device, size: int, dtype: torch.dtype, *others: torch.dtype) -> bool:
    """Whether heads of `size` numbers of one of these types are computed here: dtype, or one of the others."""
    return device.type == "cpu" and size % 8 == 0 and size <= LARGEST and dtype in others and library() is not None


def _require(code: int) -> None:
    if code:
        raise MemoryError("attention: no memory for the keys and values of one group of a forest")


def _layout(forest: Forest) -> tuple[Tensor, int, int]:
    """First segment of each group and one past the last; most tokens and most segments of a group."""
    if "kernel" not in forest.cache:
        counts = torch.bincount(forest.group_S, minlength=forest.groups)
        first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        tokens = torch.zeros(forest.groups, dtype=torch.int64).index_add_(0, forest.group_S, forest.length_S)
        forest.cache["kernel"] = first, int(tokens.max()), int(counts.max())
    return forest.cache["kernel"]


class _OnForest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, forest: Forest, heads: int, kv: int, scale: float, window: int) -> Tensor:
        tokens, _, size = rows.shape
        out, softmax = rows.new_empty(tokens, heads, size), torch.empty(tokens, heads, 2)
        out[len(forest) :] = 0.0
        ctx.settings = (forest, heads, kv, scale, window)
        _run(rows, out, softmax, ctx.settings)
        ctx.save_for_backward(rows, out, softmax)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, out, softmax = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_rows[len(ctx.settings[0]) :] = 0.0
        _run(rows, out, softmax, ctx.settings, grad.to(rows.dtype).contiguous(), grad_rows)
        return grad_rows, None, None, None, None, None


def _run(rows: Tensor, out: Tensor, softmax: Tensor, settings: tuple[Any, ...], *gradients: Tensor) -> None:
    forest, heads, kv, scale, window = settings
    first, most_tokens, most_segments = _layout(forest)
    table = [x.data_ptr() for x in (forest.start_S, forest.length_S, forest.parent_S, first)]
    sizes = [forest.groups, most_tokens, most_segments, window, heads, kv, rows.shape[-1]]
    pointers = [x.data_ptr() for x in (rows, out, softmax, *gradients)] + [None] * (2 - len(gradients))
    half = rows.dtype == torch.bfloat16
    _require(library().rlhf_forest(*table, *sizes, half, scale, torch.get_num_threads(), *pointers))


def on_forest(rows: Tensor, forest: Forest, heads: int, kv_heads: int, scale: float, window: int | None) -> Tensor:
    """rows [T', H+2K, D], float32 or bfloat16, heads ordered queries, keys, values -> [T', H, D].

    Sums are float32. T' may exceed the forest's tokens: zeros come out there, and no gradient goes in.
    """
    return _OnForest.apply(rows.contiguous(), forest, heads, kv_heads, scale, window or 0)


def step(
    projected: Tensor, turns: Tensor, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor, *, append: bool
) -> Tensor:
    """Attention of one new token of each of N sequences, float32 -> [N, H*D].

    projected  [N, H+2K, D] queries, keys and values before rotary positions, whose pairs lie side by side
    turns      [C, D] cosine and sine of each pair, by position
    rows       [N] row of the cache of each sequence; positions [N] of its token
    keys       [R, K, D, C]; values [R, K, C, D]; the token's own are written there first, or are there already
    """
    n, width, size = projected.shape
    kv, columns = values.shape[1], values.shape[2]
    heads = width - 2 * kv
    out = projected.new_empty(n, heads * size)
    pointers = [x.data_ptr() for x in (rows, positions, projected, turns, keys, values, out)]
    threads = torch.get_num_threads()
    _require(library().rlhf_decode(n, columns, heads, kv, size, append, size**-0.5, threads, *pointers))
    return out


def store(turned: Tensor, start: Tensor, length: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    """Keys and values of prompts into the rows of their samples.

    turned  [T, H+2K, D] with rotary positions, the tokens of all prompts one after another
    start   [P] and length [P] of each prompt there; rows [P, S]; keys and values as in `step`
    """
    prompts, samples = rows.shape
    kv, columns, size = values.shape[1:]
    heads = turned.shape[1] - 2 * kv
    pointers = [x.data_ptr() for x in (start, length, rows, turned, keys, values)]
    library().rlhf_store(prompts, samples, columns, heads, kv, size, torch.get_num_threads(), *pointers)
