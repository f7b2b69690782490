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
}
FAST = ("deep norm", "sandwich", "experts")  # of the whole chain, in the fast suite
