"""Every architecture option as a shape over the preset "test", which the core and the whole chain are tested with."""

from __future__ import annotations

from typing import Any

LATENT = {"attention": "latent", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
SIX = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
LAMBDA = {"sliding_window": 4, "first_tokens": 2}
T5 = {"positions": "t5", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}

CASES: dict[str, dict[str, Any]] = {
    "layer norm": {"norm": "layer"},
    "post-norm": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich", "norm": "layer", "attention_bias": True},
    "deep norm": {"norm": "deep", "mlp_bias": True, "feed_forward": "gelu"},
    "geglu": {"feed_forward": "geglu"},
    "glu": {"feed_forward": "glu", "norm": "layer"},
    "relu": {"feed_forward": "relu"},
    "silu": {"feed_forward": "silu", "norm_placement": "post"},
    "tanh": {"feed_forward": "tanh", "mlp_bias": True},
    "experts": {"num_local_experts": 4},
    "experts, geglu": {"num_local_experts": 3, "num_experts_per_tok": 1, "feed_forward": "geglu", "norm": "deep"},
    "interpolation": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "dynamic NTK": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "YaRN": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}},
    "truncated basis": {"truncated_basis_high": 0.05, "truncated_basis_low": 0.005, "truncated_basis_value": 0.01},
    "ReRoPE": {"rerope_window": 4, "rerope_trained": 6},
    "leaky ReRoPE": {"rerope_window": 3, "rerope_factor": 2.0, "norm": "layer"},
    "alibi": {"positions": "alibi", **SIX},
    "alibi, window": {"positions": "alibi", "sliding_window": 6},
    "t5": {**T5, "norm": "layer"},
    "t5, first tokens": {**T5, **LAMBDA},
    "learned": {"positions": "learned", "max_position_embeddings": 256},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "no positions, window": {"positions": "none", "sliding_window": 5},
    "window": {"sliding_window": 5},
    "experts, window": {"num_local_experts": 4, "sliding_window": 5},
    "window, relu": {"sliding_window": 5, "feed_forward": "relu"},
    "first tokens": LAMBDA,
    "prefix": {"prefix_attention": True},
    "prefix, t5": {**T5, "prefix_attention": True},
    "latent": LATENT,
    "latent, first tokens": {**LATENT, "q_lora_rank": 10, "attention_bias": True, **LAMBDA},
}
# Of the whole chain, in the fast suite:
FAST = ("deep norm", "sandwich", "experts", "prefix, t5", "latent, first tokens")
