"""Latent attention against transformers' DeepSeek-V2 and V3 over the same weights, and what its cache holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from pipeline.llama.options.latent import halves
from tests.architectures import LATENT
from tests.small import policy

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip


def test_pairs_become_halves() -> None:
    assert halves(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("rank", [None, 10])
def test_a_deepseek_v2_without_experts_is_the_same_model(rank: int | None) -> None:
    """Whole models: the same parameter names, logits to 1e-5, and the same numbers in the cache but for their order."""
    ours = policy(0, 0.2, **LATENT, q_lora_rank=rank).model
    config = DeepseekV2Config(
        **SIZES, q_lora_rank=rank, vocab_size=ours.config.vocab_size, first_k_dense_replace=2, pad_token_id=0
    )
    theirs = DeepseekV2ForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(4, 97, (2, 11))
    with torch.no_grad():
        mine, other = ours(ids, use_cache=True), theirs(ids, use_cache=True)
        torch.testing.assert_close(mine.logits, other.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(mine.past_key_values.layers, other.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, halves(b.values), atol=1e-5, rtol=1e-5)
        assert a.keys.shape == (2, 1, 11, 12) and a.values.shape == (2, 1, 11, 4)


def test_an_attention_of_deepseek_v3_with_biases() -> None:
    ours = policy(0, 0.2, **LATENT, q_lora_rank=10, attention_bias=True).model
    layer = ours.model.layers[0].self_attn
    config = DeepseekV3Config(**SIZES, q_lora_rank=10, attention_bias=True, attn_implementation="eager")
    theirs = DeepseekV3Attention(config, 0).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
        theirs.load_state_dict(layer.state_dict())
        x, at = torch.randn(1, 9, 32), torch.arange(9)[None]
        _, shared = ours.model._on_rows(x, at, None, None)
        causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        turns = DeepseekV3RotaryEmbedding(config)(x, at)
        expected = theirs(x, position_embeddings=turns, attention_mask=causal)[0]
        torch.testing.assert_close(layer(x, **shared)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_cache_holds_latents_and_rotary_keys_alone() -> None:
    model = policy(**LATENT).model
    cache = DynamicCache(config=model.config)
    model(torch.randint(4, 97, (1, 20)), past_key_values=cache, use_cache=True)
    assert sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values)) == 20 * 2 * (12 + 4)
