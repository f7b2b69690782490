"""What a model directory may say about itself: which keys are refused, which our core knows, which are only noted.

    check_config(config, where) -> Verdict(core, why, ignored)

A config.json is data from somewhere else. Keys that execute code or name an attention implementation are refused
(CVE-2026-4372 and CVE-2026-5241 went through them); sizes must be plain integers in bounds; a field of the
architecture that our core does not know sends the model to transformers' own class, remote code off. Of our own type
nobody else has a class: there an unknown field is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.flow.artifacts import read_object
from pipeline.flow.config import nearest, parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama import options
from pipeline.llama.rope_settings import MOST_POSITIONS, RopeSettings, rope_fields, rope_type

MAX_BYTES = 4 << 20  # of a config file
REFUSED = (
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "custom_generate",
    "code_revision",
    "use_kernels",
)
REFUSED_STARTS = (
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)
# Integer fields and the largest value that any published model comes near.
SIZES = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": MOST_POSITIONS,
}
KNOWN = {
    *SIZES, "model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "rope_theta",
    "rope_scaling", "attention_bias", "mlp_bias", "attention_dropout", "pretraining_tp", "initializer_range",
    "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "num_labels", "problem_type",
}  # fmt: skip
# Of the model types beside "llama" that the core may compute.
MORE: dict[str, set[str]] = {
    options.MODEL_TYPE: set(options.DEFAULTS),
    "mixtral": {
        "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "sliding_window", "output_router_logits",
        "router_jitter_noise",
    },
    "mistral": {"sliding_window"},
}  # fmt: skip
MISTRAL_WINDOW = 4096  # where its config.json says nothing
# Say nothing about what is computed.
HARMLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """core: our own model computes this config. why: what sent it elsewhere. ignored: keys noted and not used."""

    core: bool
    why: tuple[str, ...]
    ignored: tuple[str, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: missing; a model directory has a config.json, safetensors and a tokenizer")
    return read_object(path, most=MAX_BYTES)


def refuse_code(config: Any, where: str) -> None:
    """Raises UserError for a key, at any depth, that would execute code or choose a kernel."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if value is not None and (key in REFUSED or str(key).startswith(REFUSED_STARTS)):
                raise UserError(
                    f"{where}: the key {key!r} runs code or names an attention implementation and is refused; "
                    "remove it if you trust the weights, what is computed does not need it"
                )
            refuse_code(value, where)
    elif isinstance(config, list):
        for value in config:
            refuse_code(value, where)


def check_config(config: Mapping[str, Any], where: str = "config.json") -> Verdict:
    """Raises UserError for what is refused; otherwise says who computes the model and why."""
    refuse_code(config, where)
    if config.get("transformers_weights") is not None:  # other files than those whose headers are checked
        raise UserError(
            f"{where}: transformers_weights names a weight file; call it model.safetensors and remove the key"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: model_type is missing; a transformers model directory names its family there")
    for key, most in SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"{where}: {key} is {value!r}, a whole number from 1 to {most} was expected")
    whole = kind == "mistral" and config.get("sliding_window", MISTRAL_WINDOW) is None
    if whole or (kind != "llama" and kind not in MORE):
        return Verdict(False, (f"model_type {kind}",), ())
    _check_heads(config, where)
    known = KNOWN | HARMLESS | MORE.get(kind, set())
    unknown = [key for key in sorted(config.keys() - known) if config[key] is not None]
    if kind == options.MODEL_TYPE:
        return _own(config, where, unknown)
    why = [f"field {key}" for key in unknown]
    if config.get("hidden_act", "silu") not in ("swish", *options.GATED.values()):
        why.append(f"hidden_act {config['hidden_act']}")
    if config.get("router_jitter_noise"):
        why.append(f"router_jitter_noise {config['router_jitter_noise']}")
    if kind != "llama":
        why += _beyond_options({"num_local_experts": 8, **config} if kind == "mixtral" else config)
    if config.get("pretraining_tp") not in (None, 1):
        why.append(f"pretraining_tp {config['pretraining_tp']}")
    if config.get("attention_dropout"):
        why.append(f"attention_dropout {config['attention_dropout']}")
    why += _rope_beyond_core(config, where)
    return Verdict(not why, tuple(why), tuple(sorted(config.keys() & HARMLESS)))


def _own(config: Mapping[str, Any], where: str, unknown: list[str]) -> Verdict:
    """Of our own model type: no other class could take it."""
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], KNOWN | set(options.DEFAULTS))}")
    why = _rope_beyond_core(config, where)
    act = options.ACTIVATIONS.get(options.chosen(config)["feed_forward"])
    if config.get("hidden_act", act) != act:
        why.append(f"hidden_act {config['hidden_act']} beside feed_forward {options.chosen(config)['feed_forward']}")
    idle = {"pretraining_tp": (None, 1), "attention_dropout": (None, 0)}
    why += [f"{key} {config[key]}" for key, values in idle.items() if config.get(key) not in values]
    try:
        options.refuse(config)
    except ValueError as problem:
        raise UserError(f"{where}: {problem}") from problem
    if why:
        raise UserError(f"{where}: {why[0]} is not what a model of type {options.MODEL_TYPE} computes; correct it")
    return Verdict(True, (), tuple(sorted(config.keys() & HARMLESS)))


def _beyond_options(config: Mapping[str, Any]) -> list[str]:
    try:
        options.refuse(config)
    except ValueError as problem:
        return [str(problem)]
    return []


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    heads, hidden = config.get("num_attention_heads", 32), config.get("hidden_size", 4096)
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    size = config.get("head_dim") or hidden // heads
    if size % 2 or not size:
        raise UserError(f"{where}: heads of size {size}: rotary positions need an even, positive size")
    eps = config.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"{where}: rms_norm_eps is {eps!r}, a number between 0 and 1 was expected")


def _rope_beyond_core(config: Mapping[str, Any], where: str) -> list[str]:
    """Fields and types that our core does not know. UserError for values that no type takes."""
    why = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            return [f"{name} of an unknown form"]
        kind = rope_type(rope)
        fields = rope_fields(kind) if isinstance(kind, str) else None
        beyond = [f"{name}.{key}" for key in sorted(set(rope) - fields)] if fields else [f"{name} of type {kind!r}"]
        if not beyond:
            own = {key: value for key, value in rope.items() if key != "type"}
            parse_settings(RopeSettings, {**own, "rope_type": kind}, f"{where}: {name}")
        why += beyond
    return why
