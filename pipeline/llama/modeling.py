"""LLaMA written out: RMSNorm, pre-norm, rotary positions, grouped-query attention, SwiGLU, KV cache.

Parameter names, class names, config and save format are transformers' own, so checkpoints move both ways without
conversion; transformers' Auto registrations stay as they are. Three ways in:

    model(input_ids, attention_mask)              padded batches, transformers' eager, sdpa ... attention
    model(..., past_key_values=cache)             decoding, through transformers' Cache contract
    model(**forest_inputs(forest))                a token forest (attention.py), the way everything is trained

Shapes: B rows, L tokens of a row, T tokens of a forest, D hidden, H query heads, K key heads, h half a head size.
Sources: Touvron et al. 2023 (architecture); Su et al. 2021 (rotary); Zhang and Sennrich 2019 (RMSNorm);
Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped queries).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.data.forest import Forest
from pipeline.llama import attention, kernel
from pipeline.llama.rope import new_rotary


class _Norm(torch.autograd.Function):
    """x / rms(x) * w in float32, rounded once. By hand because autograd's chain of reductions costs four times it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.compiled = kernel.takes(x, x.shape[-1]) and weight.dtype == torch.float32
        if ctx.compiled:
            x, inverse = x.contiguous(), torch.empty(x.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(x, weight, inverse)
            return kernel.norm(x, weight, eps, inverse)
        wide = x.float()
        inverse = torch.rsqrt_(
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps)
        )
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.compiled:
            size = x.shape[-1]
            count = -(-(x.numel() // size) // kernel.ROWS)
            parts = torch.empty(count, size, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            dx = kernel.norm(x, weight, 0.0, inverse, grad.to(x.dtype).contiguous(), parts)
            return dx, None if parts is None else parts.sum(0), None
        unit = x.float() * inverse
        grad = grad.float()
        dweight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dunit = grad * weight
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), dweight, None


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.variance_epsilon)


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up of [gate | up], one pass over memory each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernel.swiglu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return kernel.swiglu(x, grad.to(x.dtype).contiguous())


class LlamaMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.silu = config.hidden_act in ("silu", "swish")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not (self.silu and kernel.takes(x, gate.out_features)):
            return self.down_proj(self.act_fn(gate(x)) * up(x))
        if _is_plain(gate) and _is_plain(up) and gate.bias is None:
            both = F.linear(x, torch.cat((gate.weight, up.weight)))  # one product instead of two
        else:
            both = torch.cat((gate(x), up(x)), -1)
        if not kernel.takes(both, gate.out_features):  # autocast to float16, or a layer that gives what it likes
            gates, ups = both.chunk(2, -1)
            return self.down_proj(self.act_fn(gates) * ups)
        return self.down_proj(_Swiglu.apply(both.contiguous()))


def _rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, H, L, 2h], halves paired (i, i + h), with cos and sin [B, 1, L, 2h]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _eager(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The plain formula on [B, H, L, D]; transformers' contract returns [B, L, H, D] and the weights."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class LlamaAttention(nn.Module):
    window: int | None = None  # tokens that a query sees, itself among them

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        size: Any = config.head_dim  # head and key-head numbers are filled in by LlamaConfig, never None here
        kv_heads: Any = config.num_key_value_heads
        self.head_dim, self.heads, self.kv_heads = size, config.num_attention_heads, kv_heads
        self.num_key_value_groups = self.heads // self.kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> [B, L, D] and the weights where the implementation has them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        q, k = _rotate_half_split(q, cos, sin), _rotate_half_split(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def on_forest(self, x: Tensor, factors: Tensor, forest: Forest) -> Tensor:
        """x [1, T, D] -> [1, T, D]. Queries, keys and values stay in one buffer."""
        rows = self._paired_rows(x[0])
        out = attention.attend(
            rows,
            forest,
            turn=factors,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scaling,
            window=self.window,
            backend=forest.cache.get("backend", "kernel"),
        )
        return self.o_proj(out.reshape(1, len(rows), -1))

    def _paired_rows(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, H+2K, 2h], the pair (i, i + h) of every query and key head moved to (2i, 2i + 1).

        Scores do not change when both heads are permuted alike, and pairs that lie together turn as complex numbers.
        Plain layers are applied as one product of their stacked and permuted weights; wrapped ones (adapters,
        quantised or sharded weights, hooks) are called, and their outputs permuted.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        turned = self.heads + self.kv_heads
        if all(_is_plain(layer) for layer in layers):
            order = self._order(x.device)
            weight = torch.cat([layer.weight for layer in layers]).index_select(0, order)
            bias = None
            if self.q_proj.bias is not None:
                bias = torch.cat([layer.bias for layer in layers]).index_select(0, order)
            return F.linear(x, weight, bias).view(len(x), -1, self.head_dim)
        q, k, v = (layer(x).view(len(x), -1, self.head_dim) for layer in layers)
        halves = torch.cat((q, k), dim=1).view(len(x), turned, 2, -1)
        return torch.cat((halves.transpose(2, 3).flatten(2), v.to(q.dtype)), dim=1)

    def _order(self, device: torch.device) -> Tensor:
        """Row order of the stacked weights: pairs together within query and key heads, values as they are."""
        known = self.__dict__.get("_row_order")
        if known is None or known.device != device:
            turned, size = self.heads + self.kv_heads, self.head_dim
            rows = torch.arange((turned + self.kv_heads) * size, device=device)
            pairs = rows[: turned * size].view(turned, 2, -1).transpose(1, 2).flatten()
            known = self.__dict__["_row_order"] = torch.cat((pairs, rows[turned * size :]))
        return known


def _is_plain(layer: nn.Module) -> bool:
    """A bare linear layer whose weight may be read without calling the layer."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not hasattr(layer.weight, "ds_id")  # sharded by ZeRO-3: gathered only when the layer is called
    )


class LlamaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, forest_factors: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        if forest_factors is not None:
            hidden_states = hidden_states + self.self_attn.on_forest(x, forest_factors, kwargs["forest"])
        else:
            hidden_states = hidden_states + self.self_attn(x, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaPreTrainedModel(PreTrainedModel):
    config_class = LlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class LlamaModel(LlamaPreTrainedModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self._build(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _build(self, config: LlamaConfig) -> None:
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm: nn.Module = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = new_rotary(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        forest: Forest | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, L] -> last_hidden_state [B, L, D]. With `forest`, B is 1 and L is T."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if forest is not None:
            if self.config._attn_implementation != attention.NAME or position_ids is None:
                raise ValueError("a forest needs use_forest(model), and forest_inputs(forest) as arguments")
            x, layer_inputs = self._on_forest(x, forest, position_ids[0])
            past_key_values = None
        else:
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
                past_key_values = DynamicCache(config=self.config)
            if position_ids is None:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
            x, layer_inputs = self._on_rows(x, position_ids, attention_mask, past_key_values, **kwargs)
            layer_inputs |= {"past_key_values": past_key_values, **kwargs}
        states = [x]
        for layer in self.layers:
            x = layer(x, **layer_inputs)
            states.append(x)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
        )

    def _on_forest(self, x: Tensor, forest: Forest, positions: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What goes into the first layer [1, T, D], and what every layer gets beside it."""
        return x, {"forest": forest, "forest_factors": self.rotary.factors(forest, positions)}

    def _on_rows(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None, **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same for rows [B, L, D] and positions [B, L]."""
        causal = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, position_ids=positions
        )
        return x, {"attention_mask": causal, "position_embeddings": self.rotary.cos_sin(positions, x.dtype)}


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    trunk: type[LlamaModel] = LlamaModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = self.trunk(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, L, V], or of the last `logits_to_keep` positions (a tensor: of those positions)."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result.to_tuple() if return_dict is False else result


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    trunk: type[LlamaModel] = LlamaModel

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.trunk(config)
        labels: Any = config.num_labels
        self.score = nn.Linear(config.hidden_size, labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores [B, num_labels] at the last real token of each row."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        last = self._last_real(hidden, input_ids, attention_mask)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        result = SequenceClassifierOutputWithPast(
            logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result.to_tuple() if return_dict is False else result

    def _last_real(self, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B] from the mask, which alone knows padding from a pad id that stands in the text.

        Without a mask: the last id that is not the pad id, as transformers has it.
        """
        pad = self.config.pad_token_id
        if mask is None:
            if ids is not None and pad is not None:
                mask = ids != pad
            elif len(hidden) == 1:
                mask = torch.ones(1, hidden.shape[1], device=hidden.device)
            else:
                raise ValueError("several rows need an attention_mask, or a pad_token_id in the config")
        real = mask[:, -hidden.shape[1] :].long()
        return (real * torch.arange(hidden.shape[1], device=hidden.device)).argmax(-1)
