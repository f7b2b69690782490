"""Architecture options of the core, as data: what there is, what goes together, and who else can say it.

    chosen(shape) -> {option: value}       every option, defaults filled in; defaults mean plain LLaMA
    refuse(shape)                          ValueError for what makes no sense together, with the key and what mends it
    form(shape)                            the model type that says it: "llama", "mixtral", ... or our own

The modules beside this one compute them, one file for each kind. No torch here: plans read this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "rlhf_llama"  # of what plain transformers cannot express

CHOICES: dict[str, tuple[str, ...]] = {  # the first is the default
    "norm": ("rms", "layer", "deep"),
    "norm_placement": ("pre", "post", "sandwich"),
    "feed_forward": ("swiglu", "geglu", "glu", "relu", "gelu", "silu", "tanh"),
    "positions": ("rotary", "alibi", "t5", "learned", "sinusoidal", "none"),
    "attention": ("full", "latent"),
}
NUMBERS: dict[str, Any] = {
    "num_local_experts": 0,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "q_lora_rank": None,
    "kv_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "sliding_window": None,
    "first_tokens": 0,
    "prefix_attention": False,
}
DEFAULTS: dict[str, Any] = {**{name: values[0] for name, values in CHOICES.items()}, **NUMBERS}
NOT_BUILT = (
    "positions", "relative_attention_num_buckets", "relative_attention_max_distance", "attention", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "sliding_window", "first_tokens",
    "prefix_attention",
)  # fmt: skip

# feed_forward -> the activation of its gate (Shazeer 2020, equation 6: GLU has a sigmoid, GEGLU the exact GELU) ...
GATED = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
# ... or of its one inner layer.
UNGATED = {"relu": "relu", "gelu": "gelu", "silu": "silu", "tanh": "tanh"}
ACTIVATIONS = GATED | UNGATED

MOST_EXPERTS = 1 << 12
# What other model types can say beside plain LLaMA. They have no biases.
MIXTRAL = {"feed_forward", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "sliding_window"}
MISTRAL = {"feed_forward", "sliding_window"}


def chosen(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a model's arguments or config.json, the default where it is not said."""
    return {name: shape.get(name, default) for name, default in DEFAULTS.items()}


def changed(shape: Mapping[str, Any]) -> set[str]:
    """The options that are not at their defaults."""
    return {name for name, value in chosen(shape).items() if value != DEFAULTS[name]}


def form(shape: Mapping[str, Any]) -> str:
    """The model type under which transformers computes the same, or our own."""
    beyond, gated = changed(shape), chosen(shape)["feed_forward"] in GATED
    biased = shape.get("attention_bias") or shape.get("mlp_bias")
    if gated and beyond <= {"feed_forward"}:
        return "llama"
    if gated and not biased and "num_local_experts" in beyond and beyond <= MIXTRAL:
        return "mixtral"
    if gated and not biased and "sliding_window" in beyond and beyond <= MISTRAL:
        return "mistral"
    return MODEL_TYPE


def refuse(shape: Mapping[str, Any]) -> None:
    """ValueError naming the key that makes no sense and what mends it."""
    options = chosen(shape)
    for name, values in CHOICES.items():
        if options[name] not in values:
            raise ValueError(f"{name} is {options[name]!r}, expected one of {', '.join(values)}")
    for name in NOT_BUILT:
        if options[name] != DEFAULTS[name]:
            raise ValueError(f"{name}: {options[name]} is not built yet; leave it at {DEFAULTS[name]}")
    if options["norm"] == "deep" and options["norm_placement"] != "post":
        raise ValueError(
            f"norm_placement is {options['norm_placement']}, but norm deep scales the residual of a post-norm: set "
            "norm_placement to post, or norm to layer"
        )
    _refuse_experts(shape, options)


def _refuse_experts(shape: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    experts, each = options["num_local_experts"], options["num_experts_per_tok"]
    if type(experts) is not int or not 0 <= experts <= MOST_EXPERTS:
        raise ValueError(f"num_local_experts is {experts!r}, a whole number from 0 to {MOST_EXPERTS} was expected")
    if not experts:
        for name in ("num_experts_per_tok", "router_aux_loss_coef"):
            if options[name] != DEFAULTS[name]:
                raise ValueError(f"{name} is {options[name]}, but there are no experts: set num_local_experts")
        return
    if type(each) is not int or not 1 <= each <= experts:
        raise ValueError(
            f"num_experts_per_tok is {each!r}, a whole number from 1 to num_local_experts ({experts}) was expected"
        )
    coefficient = options["router_aux_loss_coef"]
    if type(coefficient) not in (int, float) or not 0 <= coefficient <= 1:
        raise ValueError(f"router_aux_loss_coef is {coefficient!r}, a number from 0 to 1 was expected")
    if options["feed_forward"] not in GATED:
        raise ValueError(
            f"feed_forward is {options['feed_forward']}, but experts are gated: set it to {', '.join(GATED)}, or "
            "num_local_experts to 0"
        )
    if shape.get("mlp_bias"):
        raise ValueError("mlp_bias is set, but experts have no biases: leave it out, or set num_local_experts to 0")
