"""Multi-head latent attention with decoupled rotary keys (DeepSeek-AI 2024, DeepSeek-V2, section 2.1 and appendix C).

Keys and values of all heads come out of one compressed vector of `kv_lora_rank` numbers a token; positions are carried
by one rotary key of `qk_rope_head_dim` numbers that all heads share. A cache holds these two and nothing else: a token
takes kv_lora_rank + qk_rope_head_dim numbers a layer. Queries may be compressed too (`q_lora_rank`).

Parameter names and the pairing of rotary numbers (2i, 2i + 1) are those of transformers' DeepSeek-V2, so that weights
are interchangeable; the epsilon of both inner norms is `rms_norm_eps`.

Shapes: B rows, L queries, N keys, H heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pipeline.data.forest import Forest
from pipeline.llama.modeling import LlamaRMSNorm
from pipeline.llama.options.masked import Masks, Unturned, attend_forest, attend_rows


def halves(x: Tensor) -> Tensor:
    """The pairs (2i, 2i + 1) of the last dimension moved to (i, i + half), where rotary positions turn them here."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class LatentAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.values = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.num_key_value_groups, self.is_causal = 1, True
        self.scaling = (self.nope + self.rope) ** -0.5
        self.attention_dropout = config.attention_dropout
        self._new_queries(config)
        width, bias = config.hidden_size, config.attention_bias
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(self.rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.values), bias=False)
        self.o_proj = nn.Linear(self.heads * self.values, width, bias=bias)

    def _new_queries(self, config: Any) -> None:
        self.q_proj = nn.Linear(config.hidden_size, self.heads * (self.nope + self.rope), bias=False)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_proj(x)

    def queries(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts without and with positions, [B, H, L, nope] and [B, H, L, R], of x [B, L, hidden]; not turned."""
        q = self._queries(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain, turned = q.split((self.nope, self.rope), -1)
        return plain, halves(turned)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed vectors [B, 1, L, C] and the rotary keys [B, 1, L, R], not turned: single heads of a cache."""
        compressed, turned = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((self.rank, self.rope), -1)
        return self.kv_a_layernorm(compressed), halves(turned)

    def joined(
        self, queries: tuple[Tensor, ...], latents: Tensor, keys: Tensor, turns: Unturned
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L or N, D] of all heads, of what a cache holds of N tokens."""
        plain, turned = queries
        both = self.kv_b_proj(latents.squeeze(1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        own, values = both.split((self.nope, self.values), -1)
        turned, keys = turns.match(turned, keys)
        return torch.cat((plain, turned), -1), torch.cat((own, keys.expand(-1, self.heads, -1, -1)), -1), values

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Unturned,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        latents, keys = self.latents(hidden_states)
        keys = position_embeddings.key(keys)
        if past_key_values is not None:
            latents, keys = past_key_values.update(latents, keys, self.layer_idx)
        q, k, v = self.joined(self.queries(hidden_states), latents, keys, position_embeddings)
        out, weights = attend_rows(self, q, k, v, attention_mask, **kwargs)
        return self.o_proj(out), weights

    def on_forest(self, x: Tensor, forest: Forest, position_embeddings: Unturned, masks: Masks) -> Tensor:
        latents, keys = self.latents(x)
        q, k, v = self.joined(self.queries(x), latents, position_embeddings.key(keys), position_embeddings)
        return self.o_proj(attend_forest(q[0], k[0], v[0], forest, masks, self.scaling)[None])


class CompressedLatentAttention(LatentAttention):
    """With queries out of a compressed vector of their own."""

    def _new_queries(self, config: Any) -> None:
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
        self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * (self.nope + self.rope), bias=False)

    def _queries(self, x: Tensor) -> Tensor:
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
