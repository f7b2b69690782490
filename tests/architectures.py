"""Every architecture option as a shape over the preset "test", which the core and the whole chain are tested with."""

from __future__ import annotations

from typing import Any

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
}
FAST = ("deep norm", "sandwich", "experts")  # of the whole chain, in the fast suite
