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

    positions: Literal["rotary", "alibi", "t5", "learned", "sinusoidal", "none"] | None = added(
        None,
        "Where a token stands: rotary (Su et al. 2021), ALiBi (Press et al. 2022), T5's relative bias (Raffel et al. "
        "2020), learned, sinusoidal (Vaswani et al. 2017, section 3.5), or the causal order alone (Kazemnejad et al. "
        "2023).",
    )
    relative_attention_num_buckets: int | None = added(
        None, "Of t5: distances that have a bias of their own, half of them in growing steps; 32 by default.", ge=2
    )
    relative_attention_max_distance: int | None = added(
        None, "Of t5: all distances from here on share one bias; 128 by default.", ge=2
    )
    attention: Literal["full", "latent"] | None = added(
        None,
        "Keys and values of each key head, or of all heads out of one compressed vector, with decoupled rotary keys "
        "(DeepSeek-V2: DeepSeek-AI 2024, section 2.1).",
    )
    q_lora_rank: int | None = added(None, "Of latent: width of the compressed queries; whole without it.", ge=1)
    kv_lora_rank: int | None = added(None, "Of latent: width of the compressed keys and values, as cached.", ge=1)
    qk_nope_head_dim: int | None = added(None, "Of latent: numbers of a head's keys without positions.", ge=1)
    qk_rope_head_dim: int | None = added(None, "Of latent: numbers of the rotary key that all heads share.", ge=2)
    v_head_dim: int | None = added(None, "Of latent: numbers of a head's values.", ge=1)
    sliding_window: int | None = added(
        None, "Tokens that a query sees, itself among them (Beltagy et al. 2020; as Mistral's); all without it.", ge=1
    )
    first_tokens: int | None = added(
        None,
        "First tokens that stay visible beside the window, at StreamingLLM's distances: those within a cache of both "
        "(Xiao et al. 2024, section 3.2).",
        ge=0,
    )
    prefix_attention: bool | None = added(
        None,
        "Prompts are read in both directions, answers from left to right (Raffel et al. 2020, section 3.2.1): all "
        "turns before an answer; of a whole conversation or window what stands before its first trained token.",
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
        if (shape.get("positions") or "rotary") != "rotary" and (self.rope_theta or self.rope_parameters):
            given = "rope_theta" if self.rope_theta else "rope_parameters"
            raise ValueError(f"{given} does nothing under positions {self.positions}: leave one out")
        if self.attention == "latent" and self.head_dim:
            raise ValueError("head_dim: attention latent has qk_nope_head_dim, qk_rope_head_dim and v_head_dim instead")
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
        if self.positions not in (None, "rotary"):  # what the preset says of rotary ones
            base = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_parameters")}
        if self.attention == "latent":
            base["num_key_value_heads"] = own.get("num_attention_heads", base["num_attention_heads"])
            base["head_dim"] = own.get("qk_rope_head_dim")
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
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    option = options.chosen(shape)
    projections = attention_projections(shape)
    attention = sum(inputs * outputs for inputs, outputs in projections.values())
    if shape.get("attention_bias"):
        attention += sum(projections[name][1] for name in projections if name not in UNBIASED[option["attention"]])
    if option["attention"] == "latent":
        attention += option["kv_lora_rank"] + (option["q_lora_rank"] or 0)  # their norms
    inputs = 2 if option["feed_forward"] in options.GATED else 1  # products that read the block's input
    mlp = (inputs + 1) * hidden * inner + ((inputs * inner + hidden) if shape.get("mlp_bias") else 0)
    if experts := option["num_local_experts"]:
        mlp = experts * (mlp + hidden)  # a row of the router each
    norm = hidden * (1 if option["norm"] == "rms" else 2)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[option["norm_placement"]]
    last = 0 if option["norm_placement"] == "post" else norm
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    if option["positions"] == "learned":
        embeddings += shape.get("max_position_embeddings", MAX_POSITIONS) * hidden
    if option["positions"] == "t5":
        embeddings += option["relative_attention_num_buckets"] * shape["num_attention_heads"]
    return shape["num_hidden_layers"] * (attention + mlp + norms * norm) + last + embeddings


UNBIASED = {"full": (), "latent": ("q_proj", "q_b_proj", "kv_b_proj")}  # whatever attention_bias says


def attention_projections(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one attention, by name."""
    hidden, heads, option = shape["hidden_size"], shape["num_attention_heads"], options.chosen(shape)
    if option["attention"] != "latent":
        queries, keys = heads * head_dim(shape), (shape.get("num_key_value_heads") or heads) * head_dim(shape)
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return {**{name: (hidden, width) for name, width in widths.items()}, "o_proj": (queries, hidden)}
    rank, nope, rope, values = (option[name] for name in options.LATENT)
    queries, small = heads * (nope + rope), option["q_lora_rank"]
    first = {"q_a_proj": (hidden, small), "q_b_proj": (small, queries)} if small else {"q_proj": (hidden, queries)}
    return {
        **first,
        "kv_a_proj_with_mqa": (hidden, rank + rope),
        "kv_b_proj": (rank, heads * (nope + values)),
        "o_proj": (heads * values, hidden),
    }


def cached_numbers(shape: Mapping[str, Any]) -> int:
    """Numbers that one token puts into the cache, all layers: keys and values, or what latent attention makes them of.

    Times the size of a number it is the cache's bytes a token: 524,288 of LLaMA 7B in 16 bits.
    """
    option, layers = options.chosen(shape), shape["num_hidden_layers"]
    if option["attention"] == "latent":
        return layers * (option["kv_lora_rank"] + option["qk_rope_head_dim"])
    kv_heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    return layers * 2 * kv_heads * head_dim(shape)
