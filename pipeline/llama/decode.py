"""Decoding with a preallocated cache: what a model does for one batch of prompts and for one step.

A cache has R rows (slots) of C columns. A sequence starts in column 0 of its row, so the column of a token is
its position, and no row needs padding on the left; what lies right of a row's length is masked. Prompts enter
in batches, each computed once and copied into the rows of its K samples; then all active rows advance
together, one token a step. Who enters when, what stops and what is returned is the engine's business
(`pipeline/rollout/native.py`).

Three runners do the same thing:

    LayerRunner    runs the layers of a LLaMA (our core's or transformers') itself: queries, keys and values
                   in one product, grouped queries without repeated keys, the last layer of a prompt at its
                   last token only. Adapters that replace linear layers (LoRA ...) work: whatever is not a
                   plain linear is called.
    ForwardRunner  calls the model's own forward with `SlotCache` as its cache: every model that keeps
                   transformers' Cache contract and accepts a 4-D mask.
    VirtualRunner  the same where an adapter has virtual tokens: they take the first columns of every row,
                   which whoever counts columns and positions from outside does not see.

Shapes: R rows, C columns, N active rows, P prompts, T tokens of the longest prompt, K samples a prompt, H key
heads, G query heads a key head, W width of a head, V vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from pipeline.data.forest import roots
from pipeline.flow.errors import UserError
from pipeline.llama import kernel, virtual
from pipeline.llama.arithmetic import fast_products
from pipeline.llama.attention import filled
from pipeline.llama.choosing import NEVER
from pipeline.llama.options import MODEL_TYPE
from pipeline.llama.presets import cached_numbers

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # transformers' angles that depend on the position alone
IN_ONE_UP_TO = 1024  # hidden size up to which a CPU computes a step in one call: faster up to there on two cores
MATMUL_UP_TO = 192  # tokens of a prompt up to which a CPU uses plain products instead of SDPA


# --- the cache ----------------------------------------------------------------------------------------------


class SlotLayer(CacheLayerMixin):
    """Keys [R, H, W, C] and values [R, H, C, W] of one layer, allocated when the first prompt shows their shape.

    Of latent attention the compressed vectors and the rotary keys, which are single heads of two widths.

    Columns lie side by side where they are what a sum runs over or what is added up lane by lane: over W for scores.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # a cycle would keep keys and values until the garbage collector comes

    @property
    def cache(self) -> SlotCache:
        found = self._cache()
        assert found is not None
        return found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, width = key_states.shape
        self.allocate(heads, width, key_states, value_states, value_states.shape[-1])

    def allocate(self, heads: int, width: int, key: Tensor, value: Tensor, value_width: int | None = None) -> None:
        """Room for keys and values of the types of these tensors, unless there is room already."""
        if self.is_initialized:
            return
        rows, columns = self.cache.rows, rounded(self.cache.columns)  # zeros: a masked column may be anything finite
        self.keys, self.values = (
            key.new_zeros(rows, heads, width, columns),
            value.new_zeros(rows, heads, columns, value_width or width),
        )
        self.is_initialized = True

    def store(self, slots_PK: Tensor, keys_PHTW: Tensor, values_PHTW: Tensor) -> None:
        """Put each prompt into the rows of its K samples."""
        self.lazy_initialization(keys_PHTW, values_PHTW)
        n = keys_PHTW.shape[2]
        self.keys[slots_PK, ..., :n] = keys_PHTW.transpose(2, 3)[:, None]
        self.values[slots_PK, :, :n] = values_PHTW[:, None]

    def append(self, rows_N: Tensor, positions_N: Tensor, keys_NHW: Tensor, values_NHW: Tensor) -> None:
        self.keys[rows_N, :, :, positions_N] = keys_NHW
        self.values[rows_N, :, positions_N] = values_NHW

    def move(self, source_M: Tensor, target_M: Tensor, columns: int) -> None:
        self.keys[target_M, ..., :columns] = self.keys[source_M, ..., :columns]
        self.values[target_M, :, :columns] = self.values[source_M, :, :columns]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers' contract: take in the new states [N, H, T, W], return all that the queries may
        see."""
        at = self.cache
        if at.slots_PK is not None:
            self.store(at.slots_PK, key_states, value_states)
            return key_states, value_states
        seen = slice(at.seen)
        if at.picked_N is not None:  # a token that is stored already
            return self.keys[at.picked_N, ..., seen].transpose(2, 3), self.values[at.picked_N, :, seen]
        n = key_states.shape[0]
        keys, values = key_states[:, :, 0].to(self.keys.dtype), value_states[:, :, 0].to(self.values.dtype)
        self.append(at.row_R[:n], at.positions_N, keys, values)
        return self.keys[:n, ..., seen].transpose(2, 3), self.values[:n, :, seen]

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen, 0

    def get_max_length(self) -> int:
        return self.cache.columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class SlotCache(Cache):
    """R rows of C columns for every layer. What the next forward does with it is set before the forward.

    before    columns of virtual tokens, at the beginning of every row
    """

    def __init__(self, layers: int, rows: int, columns: int, device: torch.device, before: int = 0) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.rows, self.columns, self.before = rows, columns, before
        self.row_R = torch.arange(rows, device=device)
        self.slots_PK: Tensor | None = None
        self.picked_N: Tensor | None = None
        self.positions_N: Tensor = self.row_R
        self.seen = 0

    def fits(self, rows: int, columns: int, like: Tensor) -> bool:
        """Whether this cache, allocated for an earlier call, can serve again."""
        first = self.slot(0)
        same = not first.is_initialized or (first.keys.dtype == like.dtype and first.keys.device == like.device)
        return same and self.rows >= rows and self.columns >= columns

    def slot(self, layer: int) -> SlotLayer:
        return self.layers[layer]  # type: ignore[return-value]

    def move(self, source_M: Tensor, target_M: Tensor, columns: int) -> None:
        for layer in range(len(self.layers)):
            self.slot(layer).move(source_M, target_M, self.before + columns)


# --- runners ------------------------------------------------------------------------------------------------


class Runner(Protocol):
    cache: SlotCache

    def prefill(self, ids_PT: Tensor, lengths_P: Tensor, slots_PK: Tensor) -> Tensor:
        """Store prompts (padded on the right) in their rows; float32 logits [P, V] after each one's last
        token."""

    def step(self, tokens_N: Tensor, positions_N: Tensor, columns: int) -> Tensor:
        """Feed row n its token at its position (all below `columns`); float32 logits [N, V] of the next
        ones."""


def causal(tokens: int, like: Tensor) -> Tensor:
    """Additive mask [T, T]."""
    return torch.full((tokens, tokens), NEVER, dtype=like.dtype, device=like.device).triu_(1)


def visible(positions_N: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [N, 1, 1, columns]: a token sees the columns up to its own."""
    at = torch.arange(columns, device=positions_N.device)
    hidden = at > positions_N[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, NEVER)[:, None, None]


class ForwardRunner:
    """Any causal model that keeps transformers' Cache contract, through its own forward."""

    def __init__(self, model: nn.Module, cache: SlotCache, linear_dtype: torch.dtype | None = None) -> None:
        self.model, self.cache = model, cache
        base = base_model(model)
        self.dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        self.autocast = linear_dtype
        accepted = inspect.signature(base.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.reads_whole = getattr(base.config, "prefix_attention", False)  # prompts, in both directions
        _refuse_windows(base.config, cache.columns)

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
        with self._precision(ids.device):
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                **self.options,
                **more,
            )
        return out.logits[:, -1].float()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    def prefill(self, ids_PT: Tensor, lengths_P: Tensor, slots_PK: Tensor) -> Tensor:
        at, (prompts, tokens) = self.cache, ids_PT.shape
        positions = torch.arange(tokens, device=ids_PT.device).expand(prompts, tokens)
        last_P = lengths_P - 1
        if self.reads_whole:
            mask, more = visible(last_P, tokens, self.dtype), {"prefix_lengths": lengths_P}
        else:
            mask, more = causal(tokens, torch.empty(0, dtype=self.dtype, device=ids_PT.device)), {}
        at.slots_PK, at.seen = slots_PK, 0
        self._logits(ids_PT, positions, mask.expand(prompts, 1, tokens, tokens), **more)
        return self._again(ids_PT.gather(1, last_P[:, None]), last_P, slots_PK, tokens)

    def _again(self, ids_P1: Tensor, last_P: Tensor, slots_PK: Tensor, columns: int) -> Tensor:
        """The forward gives the logits of one column for all rows. The last tokens of prompts stand in different
        columns, so they are fed once more against the rows just stored."""
        at = self.cache
        at.slots_PK, at.picked_N, at.seen = None, slots_PK[:, 0], columns
        logits = self._logits(ids_P1, last_P[:, None], visible(last_P, columns, self.dtype))
        at.picked_N = None
        return logits

    def step(self, tokens_N: Tensor, positions_N: Tensor, columns: int) -> Tensor:
        at = self.cache
        at.slots_PK, at.picked_N, at.positions_N, at.seen = None, None, positions_N, columns
        mask = visible(positions_N, columns, self.dtype)
        return self._logits(tokens_N[:, None], positions_N[:, None], mask)


class VirtualRunner(ForwardRunner):
    """A model under virtual tokens: its own forward without them, over rows that begin with them."""

    def __init__(self, model: nn.Module, cache: SlotCache, linear_dtype: torch.dtype | None = None) -> None:
        super().__init__(base_model(model), cache, linear_dtype)
        self.adapted: Any = model

    def prefill(self, ids_PT: Tensor, lengths_P: Tensor, slots_PK: Tensor) -> Tensor:
        before, (prompts, tokens) = self.cache.before, ids_PT.shape
        positions = torch.arange(tokens, device=ids_PT.device).expand(prompts, tokens)
        whole = lengths_P if self.reads_whole else None
        inputs = virtual.with_tokens(self.adapted, ids_PT, torch.ones_like(ids_PT), positions, whole)
        base = self.adapted.get_base_model()
        filled = inputs.pop("past_key_values", None) or DynamicCache()  # all columns, under a window too
        with self._precision(ids_PT.device):
            base.base_model(**inputs, past_key_values=filled, use_cache=True)
        for number, layer in enumerate(filled.layers):
            self.cache.slot(number).store(slots_PK, layer.keys, layer.values)
        last_P = before + lengths_P - 1
        return self._again(ids_PT.gather(1, lengths_P[:, None] - 1), last_P, slots_PK, before + tokens)

    def step(self, tokens_N: Tensor, positions_N: Tensor, columns: int) -> Tensor:
        return super().step(tokens_N, self.cache.before + positions_N, self.cache.before + columns)


class LayerRunner:
    """A LLaMA's layers, run here. Weights are read when the runner is made: make one for each use."""

    def __init__(self, model: nn.Module, cache: SlotCache, linear_dtype: torch.dtype | None = None) -> None:
        base = base_model(model)
        inner: Any = base.model
        self.cache = cache
        self.embed = inner.embed_tokens
        self.layers = [_Layer(layer, base.config, linear_dtype) for layer in inner.layers]
        self.norm = normed(inner.norm)
        self.head = Linears([base.lm_head], linear_dtype)
        first = self.layers[0]
        positions = torch.arange(cache.columns, device=cache.row_R.device)[None]
        cos, sin = _rotary(inner, positions, torch.float32)
        half = first.width // 2
        self.turn_CW = torch.complex(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        self.turns_CW = torch.view_as_real(self.turn_CW).flatten(1)
        scales = [first.width**-0.5] * first.query_heads + [1.0] * first.key_heads
        self.scale_X1 = torch.tensor(scales, device=positions.device)[:, None]  # of the scores, with the queries
        self.compiled = kernel.usable(positions.device, first.width, self.embed.weight.dtype, torch.float32)
        self.inner = inner
        self._decoder: kernel.Decoder | None = None

    def prefill(self, ids_PT: Tensor, lengths_P: Tensor, slots_PK: Tensor) -> Tensor:
        if self.compiled:
            with fast_products(ids_PT.device, "fp32"):
                return self._prefill_flat(ids_PT, lengths_P, slots_PK)
        tokens = ids_PT.shape[1]
        x = self.embed(ids_PT)
        turn = self.turn_CW[:tokens, None] * self.scale_X1
        last_P = lengths_P - 1
        mask = causal(tokens, x) if x.device.type == "cpu" and tokens <= MATMUL_UP_TO else None
        for number, layer in enumerate(self.layers[:-1]):
            x = layer.prompts(x, turn, mask, self.cache.slot(number), slots_PK)
        number = len(self.layers) - 1
        x = self.layers[-1].last_tokens(x, turn, last_P, self.cache.slot(number), slots_PK)
        return self.head(self.norm(x)).float()

    def _prefill_flat(self, ids_PT: Tensor, lengths_P: Tensor, slots_PK: Tensor) -> Tensor:
        """The same through the kernel: the prompts as one run of tokens without padding."""
        forest = roots(ids_PT[torch.arange(ids_PT.shape[1]) < lengths_P[:, None]], lengths_P)
        last_P = forest.last_S
        x = self.embed(filled(forest.ids_T))
        turns = self.turns_CW[filled(forest.positions_T)]
        for number, layer in enumerate(self.layers):
            slot = self.cache.slot(number)
            slot.allocate(layer.key_heads, layer.width, x, x)
            rows, where = layer.heads(x), (forest.start_S, forest.length_S, slots_PK)
            kernel.store(rows, self.turns_CW, *where, slot.keys, slot.values)
            if number < len(self.layers) - 1:
                heads = (layer.query_heads, layer.key_heads)
                out = kernel.on_forest(rows, forest, *heads, layer.width**-0.5, turns=turns)
                x = layer.rest(x, out.flatten(1))
            else:  # of the last layer nothing is needed but the last tokens
                at = (slots_PK[:, 0].contiguous(), lengths_P - 1, slot.keys, slot.values)
                x = layer.rest(x[last_P], kernel.step(rows[last_P], self.turns_CW, *at, append=False))
        return self.head(self.norm(x)).float()

    def step(self, tokens_N: Tensor, positions_N: Tensor, columns: int) -> Tensor:
        rows_N = self.cache.row_R[: tokens_N.shape[0]]
        if self.compiled and self._decoder is None and self._in_one():
            self._decoder = self._new_decoder()
        if self._decoder is not None:
            return self._decoder(tokens_N.contiguous(), rows_N, positions_N)
        x = self.embed(tokens_N)
        if self.compiled:
            for number, layer in enumerate(self.layers):
                slot = self.cache.slot(number)
                at = (rows_N, positions_N, slot.keys, slot.values)
                x = layer.rest(x, kernel.step(layer.heads(x), self.turns_CW, *at, append=True))
            return self.head(self.norm(x)).float()
        turn = self.turn_CW[positions_N, None] * self.scale_X1
        mask = self.layers[0].visible(positions_N, columns, x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer.step(x, turn, mask, self.cache.slot(number), rows_N, positions_N)
        return self.head(self.norm(x)).float()

    def _in_one(self) -> bool:
        """Whether a step is small and plain enough to be one call: nothing that has to be called by itself, such as an
        adapter, and products that take less time than calling them."""
        hidden = self.embed.weight.shape[1]
        inputs = [linears for layer in self.layers for linears in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        norms = [self.inner.norm, *(n for layer in self.layers for n in (layer.module_norm_in, layer.module_norm_mlp))]
        return (
            hidden <= IN_ONE_UP_TO
            and type(self.embed) is nn.Embedding
            and not self.embed._forward_hooks
            and not self.embed._forward_pre_hooks
            and all(linears.bare for linears in (*inputs, self.head))
            and all(is_plain_norm(norm) for norm in norms)
            and len({norm.variance_epsilon for norm in norms}) == 1
            and all(layer.swiglu for layer in self.layers)
            and all(len(linears.weight) % kernel.LANES == 0 for linears in inputs)  # type: ignore[arg-type]
        )

    def _new_decoder(self) -> kernel.Decoder:
        layers = []
        for number, layer in enumerate(self.layers):
            slot = self.cache.slot(number)
            products = [kernel.panels(x.weight) for x in (layer.qkv, layer.out, layer.gate_up, layer.down)]  # type: ignore[arg-type]
            norms = [n.weight.detach() for n in (layer.module_norm_in, layer.module_norm_mlp)]
            layers.append([norms[0], *products[:2], norms[1], *products[2:], slot.keys, slot.values])
        norm, head = self.inner.norm, kernel.panels(self.head.weight)  # type: ignore[arg-type]
        tensors = (self.embed.weight.detach(), self.turns_CW, norm.weight.detach(), head)
        return kernel.Decoder(layers, *tensors, heads=self.layers[0].query_heads, eps=float(norm.variance_epsilon))


def _rotary(inner: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [1, C, W], from the model itself: our core's object, transformers' module."""
    if hasattr(inner, "rotary_emb"):
        return inner.rotary_emb(torch.empty(0, dtype=dtype, device=positions.device), positions)
    return inner.rotary.cos_sin(positions, dtype)


class _Layer:
    """One decoder layer: its modules, with plain linear layers that read the same input joined into one product.

    The pair (i, i + W/2) of every query and key head is moved to (2i, 2i + 1), where it turns as one complex number.
    Scores do not change when both are permuted alike; the cache holds the keys so permuted.
    """

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.query_heads = config.num_attention_heads
        self.turned = self.query_heads + self.key_heads
        rows = torch.arange((self.turned + self.key_heads) * self.width, device=layer.input_layernorm.weight.device)
        paired = rows.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten()
        order = torch.cat((paired[: self.turned * self.width], rows[self.turned * self.width :]))
        self.module_norm_in, self.module_norm_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.norm_in, self.norm_mlp = normed(self.module_norm_in), normed(self.module_norm_mlp)
        self.qkv = Linears([attention.q_proj, attention.k_proj, attention.v_proj], dtype, order)
        self.out = Linears([attention.o_proj], dtype)
        self.gate_up = Linears([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Linears([mlp.down_proj], dtype)
        self.activation = mlp.act_fn
        silu = getattr(config, "hidden_act", None) in ("silu", "swish")
        self.swiglu = silu and kernel.takes(layer.input_layernorm.weight, mlp.gate_proj.out_features)

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values [..., H*G + 2H, W] of x [..., hidden], not turned."""
        return self.qkv(self.norm_in(x)).unflatten(-1, (-1, self.width))

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries [..., H*G, W] (already scaled), turned keys and values [..., H, W] of x [..., hidden]."""
        heads = self.heads(x)
        pairs = heads[..., : self.turned, :].float().unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(heads.dtype)
        return turned[..., : self.query_heads, :], turned[..., self.query_heads :, :], heads[..., self.turned :, :]

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.out.onto(x, attended)
        both = self.gate_up(self.norm_mlp(x))
        if self.swiglu and kernel.takes(both, both.shape[-1] // 2):
            return self.down.onto(x, kernel.swiglu(both.contiguous()))
        gate, up = both.chunk(2, -1)
        return self.down.onto(x, self.activation(gate) * up)

    def prompts(self, x: Tensor, turn: Tensor, mask_TT: Tensor | None, slot: SlotLayer, slots_PK: Tensor) -> Tensor:
        prompts, tokens, _ = x.shape
        q, k, v = (y.transpose(1, 2) for y in self.project(x, turn))
        slot.store(slots_PK, k, v)
        if mask_TT is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            return self.rest(x, out.transpose(1, 2).flatten(2))
        q = q.unflatten(1, (self.key_heads, -1)).flatten(2, 3)
        scores = torch.matmul(q, k.transpose(-1, -2)).unflatten(2, (-1, tokens)) + mask_TT
        out = torch.matmul(torch.softmax(scores, -1).flatten(2, 3), v).unflatten(2, (-1, tokens))
        return self.rest(x, out.permute(0, 3, 1, 2, 4).reshape(prompts, tokens, -1))

    def last_tokens(self, x: Tensor, turn: Tensor, last_P: Tensor, slot: SlotLayer, slots_PK: Tensor) -> Tensor:
        """Keys and values of every token, the layer's output [P, hidden] at the last one only."""
        queries, keys, values = self.project(x, turn)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        slot.store(slots_PK, keys, values)
        at = torch.arange(x.shape[0], device=x.device)
        mask = self.visible(last_P, x.shape[1], x.dtype)
        return self.rest(x[at, last_P], self.attend(queries[at, last_P], keys.transpose(2, 3), values, mask))

    def step(
        self, x: Tensor, turn: Tensor, mask: Tensor, slot: SlotLayer, rows_N: Tensor, positions_N: Tensor
    ) -> Tensor:
        queries, keys, values = self.project(x, turn)
        slot.append(rows_N, positions_N, keys, values)
        n, columns = x.shape[0], mask.shape[-1]
        seen = slot.keys[:n, ..., :columns], slot.values[:n, :, :columns]
        return self.rest(x, self.attend(queries, *seen, mask))

    def visible(self, positions_N: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """`visible` as `attend` takes it, for every key head: [N*H, 1, columns]."""
        return visible(positions_N, columns, dtype)[:, 0].repeat_interleave(self.key_heads, 0)

    def attend(self, queries_N: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """One query token a row against its keys [N, H, W, C]; queries that share a key head are one product."""
        grouped = queries_N.unflatten(1, (self.key_heads, -1)).flatten(0, 1)
        scores = torch.baddbmm(mask, grouped, keys.flatten(0, 1))
        probs = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(probs, values.flatten(0, 1)).view(len(queries_N), -1)


class Linears:
    """Linear layers that read the same input, outputs side by side (in `order`); computed in `dtype` if given.

    Anything that is not exactly `nn.Linear` (an adapter, a quantised layer) is called as it is.
    """

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype | None = None, order: Tensor | None = None) -> None:
        self.called, self.order = layers, order
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not all(_is_plain(m) for m in layers):
            return
        plain = [m for m in layers if isinstance(m, nn.Linear)]
        weight = torch.cat([m.weight.detach() for m in plain]) if len(plain) > 1 else plain[0].weight.detach()
        if any(m.bias is not None for m in plain):
            biases = [weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in plain]
            self.bias = torch.cat(biases) if order is None else torch.cat(biases)[order]
        self.weight = weight if order is None else weight[order]
        self.own, self.dtype = weight.dtype, dtype or weight.dtype
        if self.dtype != self.own:
            self.weight = self.weight.to(self.dtype)
            self.bias = None if self.bias is None else self.bias.to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            out = torch.cat([m(x) for m in self.called], -1) if len(self.called) > 1 else self.called[0](x)
            return out if self.order is None else out.index_select(-1, self.order)
        if self.dtype == self.own:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.to(self.dtype), self.weight, self.bias).to(self.own)

    @property
    def bare(self) -> bool:
        """One float32 product and nothing else."""
        return self.weight is not None and self.bias is None and self.dtype == self.own == torch.float32

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """base + self(x)."""
        if self.weight is None or self.bias is not None or self.dtype != self.own or x.ndim != 2:
            return base + self(x)
        return torch.addmm(base, x, self.weight.t())


def normed(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """An RMSNorm of float32 weights without the costs of a module, by the kernel where it can; others are called."""
    if not is_plain_norm(layer):
        return layer
    weight, eps = layer.weight.detach(), float(layer.variance_epsilon)  # type: ignore[operator, arg-type]

    def compute(x: Tensor) -> Tensor:
        if kernel.takes(x, len(weight)):
            return kernel.norm(x.contiguous(), weight, eps, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return F.rms_norm(x, weight.shape, weight, eps)

    return compute


def is_plain_norm(layer: nn.Module) -> bool:
    """Whether it is an RMSNorm of float32 weights that nothing hooks into."""
    weight = getattr(layer, "weight", None)
    hooked = type(layer).__name__ != "LlamaRMSNorm" or layer._forward_hooks or layer._forward_pre_hooks
    sharded = not isinstance(weight, Tensor) or hasattr(weight, "ds_id")
    return not (hooked or sharded) and weight.dtype == torch.float32  # type: ignore[union-attr]


def _is_plain(layer: nn.Module) -> bool:
    bare = type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
    return bare and not hasattr(layer.weight, "ds_id")  # ZeRO-3 gathers a weight only when its layer is called


# --- which runner --------------------------------------------------------------------------------------------


def base_model(model: nn.Module) -> Any:
    """The causal model inside an adapter wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def runs_by_layer(model: nn.Module) -> bool:
    """True for a plain LLaMA whose weights lie on one device and whose angles depend on the position
    alone."""
    base = base_model(model)
    config = base.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        type(base).__name__ == "LlamaForCausalLM"
        and config.model_type == "llama"
        and (hasattr(base.model, "rotary") or rope.get("rope_type", "default") in STATIC_ROPE)
        and len({p.device for p in base.parameters()}) == 1
    )


def new_runner(model: nn.Module, cache: SlotCache, linear_dtype: torch.dtype | None = None) -> Runner:
    chosen = VirtualRunner if cache.before else LayerRunner if runs_by_layer(model) else ForwardRunner
    return chosen(model, cache, linear_dtype)


def new_cache(model: nn.Module, rows: int, columns: int) -> SlotCache:
    """`columns` with those of virtual tokens."""
    base = base_model(model)
    config = base.config.get_text_config()
    device = next(base.parameters()).device
    return SlotCache(config.num_hidden_layers, rows, columns, device, virtual.count(model))


def rounded(columns: int) -> int:
    """Columns that are allocated: whole vectors of the kernel."""
    return -(-columns // kernel.LANES) * kernel.LANES


def token_bytes(model: nn.Module) -> int:
    """Bytes that one token takes in the cache, all layers."""
    base = base_model(model)
    config = base.config.get_text_config()
    sizes = {name: getattr(config, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")}
    itemsize = next(p.element_size() for p in base.parameters() if p.is_floating_point())
    return cached_numbers({**config.to_dict(), **sizes}) * itemsize


def row_bytes(model: nn.Module, columns: int) -> int:
    """Bytes of one row of the cache."""
    return token_bytes(model) * rounded(columns)


def _refuse_windows(config: Any, columns: int) -> None:
    config = config.get_text_config()
    if config.model_type == MODEL_TYPE:  # our own, whose mask says what is visible
        return
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"sampling: layers of kind {sorted(kinds)} are not supported by decoding")
    sliding = "sliding_attention" in kinds or not getattr(config, "layer_types", None)
    if window and sliding and getattr(config, "use_sliding_window", True) and columns > window:
        raise UserError(
            f"sampling: prompt and answer need {columns} tokens, the model's sliding window is {window}: "
            "lower sampling.max_new_tokens or shorten the prompts"
        )


@contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, no gradients, no autocast from outside, plain attention; everything as before afterwards, also after
    an error. Precision is the engine's own setting."""
    base = base_model(model)
    if any(p.numel() == 0 for p in base.parameters()):
        raise RuntimeError("parameters are empty: gather the sharded policy before sampling from it")
    modes = [(m, m.training) for m in model.modules()]
    attention = base.config._attn_implementation
    try:
        model.eval()
        if attention not in ("eager", "sdpa", "forest"):  # "forest" is SDPA where no forest is given
            base.set_attn_implementation("sdpa")
        with torch.no_grad(), torch.autocast(next(base.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
