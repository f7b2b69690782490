"""Shapes of LLaMA models as data: published ones, and tiny ones for tests and the quickstart.

    ModelSettings(hidden_size=128, num_hidden_layers=4)     what a plan says under `model:`
    ModelSettings.model_validate("llama-3-8b")               a preset by name; single fields may be changed beside it
    settings.llama(vocab_size) -> dict                       arguments of core_config.new_config
    parameter_count(kwargs) -> int                           weights, tied embeddings counted once

No torch here: plans read this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.flow.config import added, nearest
from pipeline.llama import options
from pipeline.llama.config import SIZES
from pipeline.llama.rope_settings import PositionSettings

ROPE_THETA, MAX_POSITIONS = 10000.0, 2048  # transformers' LlamaConfig where a shape says nothing
_LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **rest: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        **rest,
    }


def _stories(
    hidden: int, inner: int, layers: int, heads: int, length: int, kv_heads: int | None = None, vocab: int = 32000
) -> dict[str, Any]:
    more = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": length}
    return _shape(vocab, hidden, inner, layers, heads, kv_heads, **more)


# Llama 1 and 2: Touvron et al. 2023; Llama 3: the configs published with the weights; stories: karpathy/llama2.c.
PRESETS: dict[str, dict[str, Any]] = {
    "test": _shape(97, 32, 48, 2, 4, 2),
    "million": _shape(1024, 128, 384, 4, 4, 2, tie_word_embeddings=True),
    "stories-260k": _stories(64, 172, 5, 8, 512, 4, 512),
    "stories-15m": _stories(288, 768, 6, 6, 256),
    "stories-42m": _stories(512, 1376, 8, 8, 1024),
    "stories-110m": _stories(768, 2048, 12, 12, 1024),
    "tinyllama-1.1b": _shape(32000, 2048, 5632, 22, 32, 4, rms_norm_eps=1e-5),
    "llama-7b": _shape(32000, 4096, 11008, 32, 32),
    "llama-13b": _shape(32000, 5120, 13824, 40, 40),
    "llama-33b": _shape(32000, 6656, 17920, 60, 52),
    "llama-65b": _shape(32000, 8192, 22016, 80, 64),
    "llama-2-7b": _shape(32000, 4096, 11008, 32, 32, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-13b": _shape(32000, 5120, 13824, 40, 40, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-2-70b": _shape(32000, 8192, 28672, 80, 64, 8, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama-3-8b": _shape(
        128256, 4096, 14336, 32, 32, 8, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192
    ),
    "llama-3-70b": _shape(
        128256, 8192, 28672, 80, 64, 8, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192
    ),
    "llama-3.1-8b": _shape(
        128256, 4096, 14336, 32, 32, 8, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_parameters={**_LLAMA31, "factor": 8.0},
    ),
    "llama-3.1-70b": _shape(
        128256, 8192, 28672, 80, 64, 8, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_parameters={**_LLAMA31, "factor": 8.0},
    ),
    "llama-3.1-405b": _shape(
        128256, 16384, 53248, 126, 128, 8, rms_norm_eps=1e-5, max_position_embeddings=131072,
        rope_parameters={**_LLAMA31, "factor": 8.0},
    ),
    "llama-3.2-1b": _shape(
        128256, 2048, 8192, 16, 32, 8, rms_norm_eps=1e-5, max_position_embeddings=131072, head_dim=64,
        tie_word_embeddings=True, rope_parameters={**_LLAMA31, "factor": 32.0},
    ),
    "llama-3.2-3b": _shape(
        128256, 3072, 8192, 28, 24, 8, rms_norm_eps=1e-5, max_position_embeddings=131072, head_dim=128,
        tie_word_embeddings=True, rope_parameters={**_LLAMA31, "factor": 32.0},
    ),
}  # fmt: skip


class ModelSettings(PositionSettings):
    """Shape of a new LLaMA. `preset` fills every field that is not given here; without one, "million" does.

    Fields from `norm` on are options beyond plain LLaMA (pipeline/llama/options), which models keep in every stage.
    """

    preset: str = Field(default="million", description="Name of a known shape.")
    hidden_size: int | None = Field(
        default=None, ge=2, le=SIZES["hidden_size"], description="Width of the residual stream."
    )
    intermediate_size: int | None = Field(
        default=None, ge=1, le=SIZES["intermediate_size"], description="Width inside the SwiGLU block."
    )
    num_hidden_layers: int | None = Field(
        default=None, ge=1, le=SIZES["num_hidden_layers"], description="Decoder layers."
    )
    num_attention_heads: int | None = Field(
        default=None, ge=1, le=SIZES["num_attention_heads"], description="Query heads."
    )
    num_key_value_heads: int | None = Field(
        default=None, ge=1, le=SIZES["num_key_value_heads"], description="Key heads; divides the query heads."
    )
    head_dim: int | None = Field(
        default=None, ge=2, le=SIZES["head_dim"], description="Size of a head; hidden / query heads by default."
    )
    max_position_embeddings: int | None = Field(
        default=None, ge=1, le=SIZES["max_position_embeddings"], description="Longest context promised."
    )
    rms_norm_eps: float | None = Field(default=None, gt=0, description="Added to the mean square before the root.")
    rope_theta: float | None = Field(default=None, gt=0, description="Base of the rotary wavelengths.")
    tie_word_embeddings: bool | None = Field(default=None, description="The head is the embedding's own matrix.")
    attention_bias: bool = Field(default=False, description="Biases on the attention projections.")
    mlp_bias: bool = Field(default=False, description="Biases in the SwiGLU block.")
    initializer_range: float = Field(default=0.02, gt=0, lt=1, description="Standard deviation of new weights.")
    norm: Literal["rms", "layer", "deep"] | None = added(
        None, "Normalisation: RMSNorm, LayerNorm, or DeepNorm with its scaling by depth (Wang et al. 2022, figure 2)."
    )
    norm_placement: Literal["pre", "post", "sandwich"] | None = added(
        None,
        "Norms before each block, behind the residual, or on both sides of each block (Ding et al. 2021, section 2.4); "
        "pre by default, post with norm deep.",
    )
    feed_forward: Literal["swiglu", "geglu", "glu", "relu", "gelu", "silu", "tanh"] | None = added(
        None, "Gated (Shazeer 2020, equation 6: SwiGLU, GEGLU, GLU), or one inner layer with that activation."
    )
    num_local_experts: int | None = added(
        None,
        "Feed-forwards among which a router chooses for each token (Jiang et al. 2024, section 2.1); 0: one for all.",
        ge=0,
        le=options.MOST_EXPERTS,
    )
    num_experts_per_tok: int | None = added(None, "How many of them compute each token; 2 by default.", ge=1)
    router_aux_loss_coef: float | None = added(
        None,
        "Weight of the load-balancing loss in every stage that trains (Fedus et al. 2021, equations 4 to 6); 0.001 by "
        "default.",
        ge=0,
        le=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return {"preset": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is not known{nearest(self.preset, PRESETS)}")
        shape = self.llama(2)
        heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if shape["hidden_size"] % heads:
            raise ValueError(f"hidden_size {shape['hidden_size']} is no multiple of num_attention_heads {heads}")
        if self.rope_parameters and self.rope_parameters.rope_theta and self.rope_theta:
            raise ValueError("rope_theta is given twice, here and in rope_parameters; keep one")
        if head_dim(shape) % 2:
            raise ValueError(f"head_dim {head_dim(shape)} is odd: rotary positions turn pairs")
        options.refuse(shape)
        return self

    def llama(self, vocab_size: int) -> dict[str, Any]:
        """Arguments of LlamaConfig for a vocabulary of this size, and the options that are set."""
        own = {k: v for k, v in self.model_dump(exclude={"preset", "rope_parameters"}).items() if v is not None}
        base = dict(PRESETS[self.preset])
        if "num_attention_heads" in own and "num_key_value_heads" not in own:
            base["num_key_value_heads"] = own["num_attention_heads"]
        if {"hidden_size", "num_attention_heads"} & own.keys():
            base.pop("head_dim", None)
        if "rope_theta" in own and "rope_parameters" in base:
            base["rope_parameters"] = {**base["rope_parameters"], "rope_theta": own["rope_theta"]}
        if self.norm == "deep":
            base["norm_placement"] = "post"
        found = {**base, **own, "vocab_size": vocab_size}
        if self.rope_parameters:
            theta = found.pop("rope_theta", base.get("rope_parameters", {}).get("rope_theta", ROPE_THETA))
            length = found.setdefault("max_position_embeddings", MAX_POSITIONS)
            found["rope_parameters"] = self.rope_parameters.parameters(theta, length, head_dim(found))
        return found


def head_dim(shape: Mapping[str, Any]) -> int:
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def parameter_count(shape: Mapping[str, Any]) -> int:
    """Weights of a causal LM of this shape; a tied head counts once, and every expert."""
    hidden, inner, size = shape["hidden_size"], shape["intermediate_size"], head_dim(shape)
    option = options.chosen(shape)
    queries, keys = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    attention = 2 * hidden * queries + 2 * hidden * keys
    if shape.get("attention_bias"):
        attention += queries + 2 * keys + hidden
    inputs = 2 if option["feed_forward"] in options.GATED else 1  # products that read the block's input
    mlp = (inputs + 1) * hidden * inner + ((inputs * inner + hidden) if shape.get("mlp_bias") else 0)
    if experts := option["num_local_experts"]:
        mlp = experts * (mlp + hidden)  # a row of the router each
    norm = hidden * (1 if option["norm"] == "rms" else 2)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[option["norm_placement"]]
    last = 0 if option["norm_placement"] == "post" else norm
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return shape["num_hidden_layers"] * (attention + mlp + norms * norm) + last + embeddings
