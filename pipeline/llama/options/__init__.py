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
    "truncated_basis_low": 0.0,
    "truncated_basis_high": 0.0,
    "truncated_basis_value": 0.0,
    "rerope_window": None,
    "rerope_factor": None,
    "rerope_trained": None,
}
DEFAULTS: dict[str, Any] = {**{name: values[0] for name, values in CHOICES.items()}, **NUMBERS}
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # what latent attention needs
MOST = 1 << 26  # of any size here

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
    if options["norm"] == "deep" and options["norm_placement"] != "post":
        raise ValueError(
            f"norm_placement is {options['norm_placement']}, but norm deep scales the residual of a post-norm: set "
            "norm_placement to post, or norm to layer"
        )
    _refuse_experts(shape, options)
    _refuse_positions(shape, options)
    _refuse_windows(options)
    _refuse_latent(shape, options)
    _refuse_rotary(shape, options)


def _refuse_positions(shape: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    positions, rope = options["positions"], shape.get("rope_parameters") or {}
    if positions != "rotary" and rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters of type {rope['rope_type']} do nothing under positions {positions}: leave them out, or "
            "set positions to rotary"
        )
    count, furthest = (options[f"relative_attention_{name}"] for name in ("num_buckets", "max_distance"))
    if positions != "t5":
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            if options[name] != DEFAULTS[name]:
                raise ValueError(f"{name} does nothing under positions {positions}: set positions to t5")
        return
    sides = 2 if options["prefix_attention"] else 1  # of a query
    if type(count) is not int or not 2 * sides <= count <= MOST or count % sides:
        kind = f"{'an even' if sides == 2 else 'a whole'} number from {2 * sides}"
        raise ValueError(f"relative_attention_num_buckets is {count!r}, {kind} was expected")
    exact = count // sides // 2
    if type(furthest) is not int or not exact < furthest <= MOST:
        raise ValueError(
            f"relative_attention_max_distance is {furthest!r}, a whole number above {exact} was expected: so many "
            f"distances have one of {count} buckets each"
        )


def _refuse_windows(options: Mapping[str, Any]) -> None:
    window, first, prefix = (options[name] for name in ("sliding_window", "first_tokens", "prefix_attention"))
    if window is not None and (type(window) is not int or not 1 <= window <= MOST):
        raise ValueError(f"sliding_window is {window!r}, a whole number of tokens from 1 was expected")
    if type(first) is not int or not 0 <= first <= MOST:
        raise ValueError(f"first_tokens is {first!r}, a whole number of tokens from 0 was expected")
    if first and window is None:
        raise ValueError("first_tokens stay visible beside a window, but there is none: set sliding_window")
    if type(prefix) is not bool:
        raise ValueError(f"prefix_attention is {prefix!r}, true or false was expected")
    if prefix and window is not None:
        raise ValueError("prefix_attention reads a prompt as a whole, sliding_window hides parts of it: leave one out")


def _refuse_latent(shape: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    given = {name: options[name] for name in (*LATENT, "q_lora_rank")}
    if options["attention"] != "latent":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} does nothing under attention {options['attention']}: set attention to latent")
        return
    for name, value in given.items():
        if value is None and name in LATENT:
            raise ValueError(f"attention latent needs {name}: set {', '.join(LATENT)}, and q_lora_rank if you like")
        if value is not None and (type(value) is not int or not 1 <= value <= MOST):
            raise ValueError(f"{name} is {value!r}, a whole number from 1 was expected")
    if given["qk_rope_head_dim"] % 2:
        raise ValueError(f"qk_rope_head_dim {given['qk_rope_head_dim']} is odd: rotary positions turn pairs")
    if options["positions"] != "rotary":
        raise ValueError(
            f"positions is {options['positions']}, but attention latent carries positions in rotary keys of their own: "
            "set positions to rotary, or attention to full"
        )
    if options["norm"] == "deep":
        raise ValueError(
            "norm deep says how queries, keys and values begin, which attention latent compresses: set norm to layer, "
            "or attention to full"
        )
    heads = shape.get("num_attention_heads")
    if shape.get("num_key_value_heads", heads) not in (None, heads):
        raise ValueError(
            f"num_key_value_heads is {shape['num_key_value_heads']}, but under attention latent every head has keys of "
            "its own out of one vector: leave it out, or set it to null where another file of the plan sets it"
        )


def only_kernels(shape: Mapping[str, Any]) -> bool:
    """Whether attention is such that every implementation of transformers' computes it: LLaMA's own."""
    return not changed(shape) & {"positions", "attention", "sliding_window", "prefix_attention", "rerope_window"}


def _refuse_rotary(shape: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    low, high, value = (options[f"truncated_basis_{name}"] for name in ("low", "high", "value"))
    for name, number in (("low", low), ("high", high), ("value", value)):
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise ValueError(f"truncated_basis_{name} is {number!r}, radians a token from 0 to 1 were expected")
    if not high and (low or value):
        raise ValueError("truncated_basis_low and truncated_basis_value do nothing without truncated_basis_high")
    if max(low, value) > high:
        raise ValueError(f"truncated_basis_high is {high}, below truncated_basis_low or _value: raise it")
    window = options["rerope_window"]
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"rerope_window is {window!r}, a whole number of tokens from 1 was expected")
    for name, least in (("rerope_factor", 1), ("rerope_trained", 2)):
        number = options[name]
        if number is None:
            continue
        if window is None:
            raise ValueError(f"{name} does nothing without rerope_window")
        if type(number) not in (int, float) or number < least:
            raise ValueError(f"{name} is {number!r}, a number from {least} was expected")
    used = next((name for name in ("truncated_basis_high", "rerope_window") if options[name]), None)
    if used and options["positions"] != "rotary":
        raise ValueError(f"{used} changes rotary positions, but positions is {options['positions']}: leave one out")
    if used and options["attention"] != "full":
        raise ValueError(f"{used} needs full attention, but attention is {options['attention']}: leave one out")
    if window and options["sliding_window"]:
        raise ValueError("rerope_window and sliding_window are two windows over the same keys: leave one out")
    if window and options["prefix_attention"]:
        raise ValueError("rerope_window looks back, prefix_attention ahead too: leave one out")
    rope = shape.get("rope_parameters") or {}
    if used and rope.get("rope_type") == "dynamic":
        raise ValueError(f"{used} needs frequencies that do not change, but rope_type is dynamic: choose another")


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
