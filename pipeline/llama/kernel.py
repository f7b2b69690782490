"""The Python side of kernel.c: what a LLaMA does on a CPU between its matrix products.

Built when the package is installed, where there is a C compiler; without it, on other devices and for other types
the same is computed by PyTorch's operators, more slowly. `usable` and `takes` say which it will be.
Every function runs on as many threads as PyTorch does and gives the same bits on any number of them.

Shapes: T tokens, H query heads, K key heads, D head size, N sequences of a step, R rows and C columns of a cache,
P prompts, S samples of each.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.data.forest import Forest

VERSION = 6  # of the functions' arguments, the same as in kernel.c
LANES = 16  # columns of a cache come in multiples of this
TYPES = (torch.float32, torch.bfloat16)
LARGEST = 256  # head size

_INT: Any = ctypes.c_int
_LONG: Any = ctypes.c_int64
_POINTER: Any = ctypes.c_void_p
_FLOAT: Any = ctypes.c_float


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
    found.rlhf_forest.argtypes = [_POINTER] * 4 + [_LONG] * 4 + [_INT] * 4 + [_FLOAT, _INT] + [_POINTER] * 6
    found.rlhf_decode.argtypes = [_LONG] * 2 + [_INT] * 4 + [_FLOAT, _INT] + [_POINTER] * 7
    found.rlhf_step.argtypes = [_LONG] * 5 + [_INT] * 4 + [_FLOAT, _INT] + [_POINTER] * 9
    found.rlhf_store.argtypes = [_LONG] * 3 + [_INT] * 4 + [_POINTER] * 7
    found.rlhf_norm.argtypes = [_LONG] * 2 + [_INT, _FLOAT, _INT] + [_POINTER] * 6
    found.rlhf_swiglu.argtypes = [_LONG] * 2 + [_INT] * 2 + [_POINTER] * 3
    found.rlhf_chosen.argtypes = [_LONG] * 2 + [_INT, _FLOAT, _INT] + [_POINTER] * 8
    found.rlhf_chosen.restype = None
    found.rlhf_norm.restype = found.rlhf_swiglu.restype = found.rlhf_store.restype = None
    return found


def usable(device: torch.device, size: int, dtype: torch.dtype, *others: torch.dtype) -> bool:
    """Whether heads of `size` numbers of one of these types are computed here: dtype, or one of the others."""
    return device.type == "cpu" and size % 8 == 0 and size <= LARGEST and dtype in others and library() is not None


def _require(code: int) -> None:
    if code:
        raise MemoryError("attention: no memory for the keys and values of one group of a forest")


def _check(types: tuple[torch.dtype, ...], *tensors: Tensor) -> None:
    """TypeError before memory is read as what it is not: every address goes on as a bare number."""
    for x in tensors:
        if x.dtype not in types or not x.is_contiguous() or x.device.type != "cpu":
            kind = f"{x.dtype} on {x.device}{'' if x.is_contiguous() else ', not contiguous'}"
            raise TypeError(f"the compiled attention takes contiguous {' or '.join(map(str, types))}, not {kind}")


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
    def forward(ctx: Any, rows: Tensor, turns: Tensor | None, forest: Forest, settings: tuple[Any, ...]) -> Tensor:
        tokens, _, size = rows.shape
        heads = settings[0]
        out, softmax = rows.new_empty(tokens, heads, size), torch.empty(tokens, heads, 2, dtype=torch.float32)
        out[len(forest) :] = 0.0
        ctx.forest, ctx.settings = forest, settings
        _run(rows, turns, out, softmax, forest, settings)
        ctx.save_for_backward(rows, turns, out, softmax)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, turns, out, softmax = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_rows[len(ctx.forest) :] = 0.0
        _run(rows, turns, out, softmax, ctx.forest, ctx.settings, grad.to(rows.dtype).contiguous(), grad_rows)
        return grad_rows, None, None, None


def _run(
    rows: Tensor,
    turns: Tensor | None,
    out: Tensor,
    softmax: Tensor,
    forest: Forest,
    settings: tuple[int, int, float, int],
    *gradients: Tensor,
) -> None:
    heads, kv, scale, window = settings
    _check((rows.dtype,) if rows.dtype in TYPES else TYPES, rows, out, *gradients)
    _check((torch.float32,), softmax, *(() if turns is None else (turns,)))
    first, most_tokens, most_segments = _layout(forest)
    window = window if window < most_tokens else 0  # as good as none
    table = [x.data_ptr() for x in (forest.start_S, forest.length_S, forest.parent_S, first)]
    sizes = [forest.groups, most_tokens, most_segments, window, heads, kv, rows.shape[-1]]
    pointers = [None if x is None else x.data_ptr() for x in (turns, rows, out, softmax, *gradients)]
    pointers += [None] * (6 - len(pointers))
    half = rows.dtype == torch.bfloat16
    _require(library().rlhf_forest(*table, *sizes, half, scale, torch.get_num_threads(), *pointers))


def on_forest(
    rows: Tensor,
    forest: Forest,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    turns: Tensor | None = None,
) -> Tensor:
    """rows [T', H+2K, D], float32 or bfloat16, heads ordered queries, keys, values -> [T', H, D].

    Sums are float32. T' may exceed the forest's tokens: zeros come out there, and no gradient goes in.
    turns  [T', D] cosine and sine by which the pairs (2i, 2i+1) of queries and keys are turned, if they are to be
    """
    return _OnForest.apply(rows.contiguous(), turns, forest, (heads, kv_heads, scale, window or 0))


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
    _check((torch.float32,), projected, turns, keys, values)
    _check((torch.int64,), rows, positions)
    out = projected.new_empty(n, heads * size)
    pointers = [x.data_ptr() for x in (rows, positions, projected, turns, keys, values, out)]
    threads = torch.get_num_threads()
    _require(library().rlhf_decode(n, columns, heads, kv, size, append, size**-0.5, threads, *pointers))
    return out


PANEL = 32  # outputs of a product that are computed together, as in kernel.c


def panels(weight: Tensor) -> Tensor:
    """[outputs, inputs] as `Decoder` takes it: [outputs / PANEL, inputs, PANEL], filled up with zeros."""
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


class Decoder:
    """A step of decoding as one call, from tokens to logits: all layers of a LLaMA, products included, float32.

    layers    of each layer [norm_in, qkv, out, norm_mlp, gate_up, down, keys, values]: products as `panels`, gates
              before ups; queries, keys and values, and their cache, as in `step`
    embed     [V, hidden]; head: as `panels`; norm [hidden]; turns [C, D] as in `step`
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Tensor]],
        embed: Tensor,
        turns: Tensor,
        norm: Tensor,
        head: Tensor,
        *,
        heads: int,
        eps: float,
    ) -> None:
        self._held = [*layers, [embed, turns, norm, head]]  # alive while their addresses are in use
        _check((torch.float32,), *(x for tensors in self._held for x in tensors))
        self._table = torch.tensor([[x.data_ptr() for x in layer] for layer in layers])
        keys, values = layers[0][-2:]
        kv, size, columns = keys.shape[1:]
        inner = layers[0][5].shape[1]
        self.vocabulary, hidden = embed.shape
        self._padded = head.shape[0] * PANEL
        self._sizes = [hidden, inner, self._padded, columns, len(layers), heads, kv, size]
        self._eps = eps
        self._pointers = [self._table.data_ptr(), *(x.data_ptr() for x in (embed, turns, norm, head))]

    def __call__(self, tokens: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [N, V] after each sequence's token, whose keys and values are written into its row first."""
        _check((torch.int64,), tokens, rows, positions)
        out = torch.empty(len(tokens), self._padded)
        pointers = [*self._pointers, *(x.data_ptr() for x in (tokens, rows, positions, out))]
        _require(library().rlhf_step(len(tokens), *self._sizes, self._eps, torch.get_num_threads(), *pointers))
        return out[:, : self.vocabulary]


def store(
    projected: Tensor, turns: Tensor, start: Tensor, length: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Keys and values of prompts into the rows of their samples.

    projected  [T, H+2K, D] as in `step`, the tokens of all prompts one after another
    start      [P] and length [P] of each prompt there; rows [P, S]; turns, keys and values as in `step`
    """
    prompts, samples = rows.shape
    kv, columns, size = values.shape[1:]
    heads = projected.shape[1] - 2 * kv
    _check((torch.float32,), projected, turns, keys, values)
    _check((torch.int64,), start, length, rows)
    pointers = [x.data_ptr() for x in (start, length, rows, projected, turns, keys, values)]
    library().rlhf_store(prompts, samples, columns, heads, kv, size, torch.get_num_threads(), *pointers)


ROWS = 64  # of a task, as in kernel.c


def takes(x: Tensor, size: int) -> bool:
    """Whether `norm` and `swiglu` compute rows of `size` numbers of this tensor."""
    return x.device.type == "cpu" and size % LANES == 0 and x.dtype in TYPES and library() is not None


def norm(
    x: Tensor, weight: Tensor, eps: float, inverse: Tensor, grad: Tensor | None = None, dweight: Tensor | None = None
) -> Tensor:
    """RMSNorm of x [..., D], float32 or bfloat16, by weight [D], float32; or with `grad` the gradient of x.

    inverse  [...] float32, 1 / rms: written forward, read backward
    dweight  [ceil(rows / ROWS), D] float32: parts of the weight's gradient, to be added up
    """
    _check((x.dtype,) if x.dtype in TYPES else TYPES, x, *(() if grad is None else (grad,)))
    _check((torch.float32,), weight, inverse, *(() if dweight is None else (dweight,)))
    out, size = torch.empty_like(x), x.shape[-1]
    half, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, out, inverse, grad, dweight)]
    library().rlhf_norm(x.numel() // size, size, half, eps, threads, *pointers)
    return out


def swiglu(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """silu(gate) * up of x = [gate | up] [..., 2 I] -> [..., I], or with `grad` [..., I] the gradient of x."""
    _check((x.dtype,) if x.dtype in TYPES else TYPES, x, *(() if grad is None else (grad,)))
    size = x.shape[-1] // 2
    out = torch.empty_like(x) if grad is not None else x.new_empty(*x.shape[:-1], size)
    half, rows = x.dtype == torch.bfloat16, x.numel() // (2 * size)
    given = None if grad is None else grad.data_ptr()
    library().rlhf_swiglu(rows, size, half, torch.get_num_threads(), x.data_ptr(), out.data_ptr(), given)
    return out


def chosen(
    logits: Tensor, ids: Tensor, temperature: float, normaliser: Tensor, logp: Tensor, entropy: Tensor | None
) -> None:
    """log softmax(logits [N, V] / temperature) at `ids` [N] and, if asked, the entropy, each [N] float32.

    normaliser  [N, 2] float32: written here, read by `chosen_gradient`
    """
    _chosen(logits, ids, temperature, normaliser, logp, entropy, None, None, None)


def chosen_gradient(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    normaliser: Tensor,
    entropy: Tensor | None,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient of the logits from those of `logp` and `entropy` of `chosen`, each [N] float32 or None."""
    out = torch.empty_like(logits)
    _chosen(logits, ids, temperature, normaliser, None, entropy, grad, grad_entropy, out)
    return out


def _chosen(logits: Tensor, ids: Tensor, temperature: float, *tensors: Tensor | None) -> None:
    *single, out = tensors
    _check((logits.dtype,) if logits.dtype in TYPES else TYPES, logits, *(() if out is None else (out,)))
    _check((torch.int64,), ids)
    _check((torch.float32,), *(x for x in single if x is not None))
    rows, size = logits.shape
    if len(ids) != rows or not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise IndexError(f"ids of {rows} rows of {size} logits, not {len(ids)} from {ids.min()} to {ids.max()}")
    pointers = [None if x is None else x.data_ptr() for x in (logits, ids, *tensors)]
    half, threads = logits.dtype == torch.bfloat16, torch.get_num_threads()
    library().rlhf_chosen(rows, size, half, 1.0 / temperature, threads, *pointers)
