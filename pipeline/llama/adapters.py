"""Adapters through peft: making them, laying one over another, merging them, and what stands for the reference beside.

    model = add_adapter(model, LoraSettings(rank=16), seed)  trainable adapter over frozen weights
    model = merged(model)                                    one plain model that computes the same
    plain, parts = taken_apart(model)                        the weights below, and every adapter over them
    model = assembled(plain, [*parts, part])                 several adapters at once, the last of them the model's own
    with adapters_off(model): ...                            the base: the reference where the start was the base itself
    copy_adapter(model, "reference"); with using_adapter(model, "reference"): ...
                                                             the reference where the row started from an adapter

No torch or peft here before a function needs them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pipeline.flow.errors import UserError
from pipeline.llama import quantise_settings
from pipeline.llama.adapter_settings import (
    IA3_INPUTS,
    IA3_TARGETS,
    LATENT_TARGETS,
    TARGETS,
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    WeightsSettings,
    another_adapter,
    require_place,
    require_reach,
    settings_of,
)
from pipeline.llama.options import MODEL_TYPE

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from pipeline.flow.stage import Workspace

OWN, BELOW = "default", "below"  # the adapter that is trained and saved, and the numbered ones that are kept under it


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and notices of transformers, peft and bitsandbytes; what matters in them is checked instead."""
    import logging
    import warnings

    from transformers.utils import logging as notices

    kernels = logging.getLogger("bitsandbytes")
    level, kernels_level, bars = notices.get_verbosity(), kernels.level, notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    kernels.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.set_verbosity(level)
        kernels.setLevel(kernels_level)
        if bars:
            notices.enable_progress_bar()


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")  # peft leaves its `peft_config` on the model inside too


def is_virtual(model: nn.Module) -> bool:
    """Whether tokens of an adapter's own stand before every text."""
    return is_adapted(model) and cast(Any, model).active_peft_config.is_prompt_learning


def peft_config(settings: AnyAdapter, *, classifier: bool, latent: bool = False) -> Any:
    """What peft calls these settings, over latent attention or any other. `weights` is no adapter and has none."""
    import peft

    common: dict[str, Any] = {"task_type": peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM}
    common["modules_to_save"] = ["score"] if classifier else None
    match settings:
        case LoraSettings():
            scale: Any = settings.alpha  # peft's annotation says int, its arithmetic takes any number
            return peft.LoraConfig(
                r=settings.rank,
                lora_alpha=scale,
                lora_dropout=settings.dropout,
                target_modules=list((LATENT_TARGETS if latent else TARGETS)[settings.targets]),
                bias="none",
                use_rslora=settings.rank_stabilised,
                use_dora=settings.dora,
                init_lora_weights="pissa" if settings.initial == "pissa" else True,
                **common,
            )
        case Ia3Settings():
            return peft.IA3Config(target_modules=list(IA3_TARGETS), feedforward_modules=list(IA3_INPUTS), **common)
        case PrefixSettings():
            width: Any = settings.projection  # None where there is no projection, which peft's annotation leaves out
            return peft.PrefixTuningConfig(
                num_virtual_tokens=settings.tokens,
                prefix_projection=width is not None,
                encoder_hidden_size=width,
                **common,
            )
        case PromptSettings():
            how = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[settings.initial]
            return peft.PromptTuningConfig(num_virtual_tokens=settings.tokens, prompt_tuning_init=how, **common)
        case PTuningSettings():
            return peft.PromptEncoderConfig(
                num_virtual_tokens=settings.tokens,
                encoder_reparameterization_type=settings.encoder.upper(),
                encoder_hidden_size=settings.hidden,
                **common,
            )
    raise ValueError(f"kind {settings.kind} is no adapter")


def add_adapter(model: nn.Module, settings: AnyAdapter, seed: int) -> Any:
    """Freeze `model` and put a trainable adapter over it; a classifier's head is trained whole. For `weights` the model
    itself, those parameters trainable that are meant.

    The same seed gives the same adapter.
    """
    import torch

    if is_adapted(model):
        raise UserError("this policy is an adapter already: say in adapter.beneath what becomes of it (merge, stack)")
    if isinstance(settings, WeightsSettings):
        return train_weights(model, settings.train)
    config = _config_over(model, settings)
    with quiet(), torch.random.fork_rng(devices=[]):
        from peft import get_peft_model

        torch.manual_seed(seed)
        made = get_peft_model(model, config)
    if isinstance(settings, LoraSettings) and settings.initial == "pissa":
        made.__dict__["taken_out"] = state_of(made)  # of the frozen weights, which are saved nowhere without it
    mark_rates(made, settings)
    return made


def _config_over(model: nn.Module, settings: AnyAdapter) -> Any:
    """peft's configuration of such an adapter over this model. UserError where the model has no place for it."""
    config: Any = model.config
    require_reach(getattr(config, "num_local_experts", 0), settings)
    option = config.to_dict() if config.model_type == MODEL_TYPE else {}
    require_place(option, settings)
    return peft_config(settings, classifier=hasattr(model, "score"), latent=option.get("attention") == "latent")


def mark_rates(model: nn.Module, settings: AnyAdapter) -> None:
    """B's own learning rate, where the optimiser looks for it (pipeline/train/optim.py)."""
    if not isinstance(settings, LoraSettings) or settings.rate_ratio == 1.0:
        return
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.rate_factor = settings.rate_ratio  # type: ignore[attr-defined]


def train_weights(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Let those parameters train whose names match a pattern, and a scalar head; freeze the others."""
    classifier = hasattr(model, "score")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not classifier and not fnmatch.filter(names, pattern):
            raise UserError(
                f"adapter.train: {pattern!r} fits none of the model's {len(names)} parameters, such as {names[0]} and "
                f"{names[-1]}"
            )
    for name, parameter in model.named_parameters():
        meant = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(meant or name.startswith("score."))
    return model


def require_same(model: nn.Module, settings: AnyAdapter) -> None:
    """Raises UserError where a plan asks for another adapter than the one that the row starts from."""
    have = settings_of(cast(Any, model).active_peft_config.to_dict())
    if have is None or have != settings.plain():
        raise another_adapter(have, settings)


def told_share(model: nn.Module, settings: AnyAdapter | None, workspace: Workspace) -> dict[str, float]:
    """How much of a model is trained, said and as figures; nothing where all of it is because nobody said otherwise."""
    if settings is None and not is_adapted(model):
        return {}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(map(quantise_settings.weights_of, model.parameters()))
    workspace.say(f"trains {trained:,} of {whole:,} parameters of the model ({100 * trained / whole:.3g} %)")
    figures: dict[str, float] = {"trained_parameters": trained, "parameters": whole}
    inner = cast(Any, model).get_base_model() if is_adapted(model) else model
    if (error := inner.__dict__.get("merge_error")) is None:
        return figures
    workspace.say(f"merged into restored weights: outputs differ by {error:.3g} at most from those over quantised ones")
    return figures | {"merge_error": error}


# --------------------------------------------------------------------------------------- one over another, and merging


@dataclass(frozen=True)
class Part:
    """An adapter apart from its model: peft's configuration and its weights under the names of its files."""

    config: Any
    state: dict[str, Tensor]


def state_of(model: Any, name: str = OWN) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in found.items()}


def merged(model: Any) -> Any:
    """The plain model that computes what an adapted one does; a head trained beside the adapter is its head.

    In place: the layers are the adapted model's own.
    """
    if is_virtual(model):
        raise UserError(
            "adapter.beneath: the row starts from virtual tokens (prefix, prompt, P-tuning), which do not merge into "
            "weights: leave `adapter` unset to train them on, or start from the policy below them"
        )
    quantisation = quantise_settings.of(model)
    if quantisation is None:
        with quiet():
            return model.merge_and_unload(safe_merge=True)
    from pipeline.llama.quantised import restore

    before = _probed(model)
    restore(model)  # what is added to weights of few bits and rounded again would be lost in part (peft#2321)
    with quiet():
        plain = model.merge_and_unload(safe_merge=True)
    plain.__dict__["merge_error"] = float((_probed(plain) - before).abs().max())
    return plain


def _probed(model: Any) -> Tensor:
    """What a model gives for a few tokens."""
    import torch

    ids = torch.arange(min(64, model.config.get_text_config().vocab_size), device=model.device)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def taken_apart(model: Any) -> tuple[Any, list[Part]]:
    """The plain model below, in place, and its adapters, the model's own last. A head that was trained beside an
    adapter is the plain model's."""
    import copy

    order = [name for name in model.peft_config if name != OWN] + [OWN]
    parts = []
    for name in order:
        config = copy.deepcopy(model.peft_config[name])
        if str(getattr(config, "init_lora_weights", "")).startswith("pissa"):
            config.init_lora_weights = True  # the directions are out of the weights by now
        parts.append(Part(config, state_of(model, name)))
    plain = model.get_base_model() if is_virtual(model) else model.unload()
    for part in parts:
        heads = [key for key in part.state if key.endswith("score.weight")]
        for key in heads:
            plain.score.weight.data.copy_(part.state.pop(key))
    return plain, parts


def assembled(plain: Any, parts: Sequence[Part]) -> Any:
    """Several adapters over one model, added up: the last is the model's own and trainable, those below it are frozen.

    A part without weights is new and starts as peft has it; where a classifier's last part brings no head, the plain
    model's is trained.
    """
    import copy

    from peft import PeftModel, TaskType, get_peft_model

    *below, own = parts
    if below and {part.config.peft_type.value for part in parts} != {"LORA"}:
        raise UserError(
            "adapter.beneath: stack adds up LoRA adapters alone, and one of the two is none: use beneath: merge"
        )
    config, classifier = copy.deepcopy(own.config), hasattr(plain, "score")
    config.task_type = TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM
    config.modules_to_save = ["score"] if classifier else None
    config.base_model_name_or_path = None
    config.inference_mode = bool(config.is_prompt_learning and own.state)  # what is stored needs no network
    with quiet():
        model = get_peft_model(plain, config)
        for number, part in enumerate(below):
            name, lower = f"{BELOW}{number}", copy.deepcopy(part.config)
            lower.modules_to_save, lower.inference_mode = None, True
            PeftModel.add_adapter(model, name, lower)  # a classifier's own way would give each a head
            _fill(model, part.state, name)
    if own.state:
        prefix = "base_model." if config.is_prompt_learning else "base_model.model."
        head = {f"{prefix}score.weight": plain.score.original_module.weight.detach()} if classifier else {}
        _fill(model, {**head, **own.state}, OWN)
    if below:
        model.base_model.set_adapter([f"{BELOW}{number}" for number in range(len(below))] + [OWN])
        for key, parameter in model.named_parameters():
            if f".{BELOW}" in key:
                parameter.requires_grad_(False)
    if config.inference_mode:
        train_tokens(model)
    return model


def _fill(model: Any, state: dict[str, Tensor], name: str) -> None:
    """UserError where an adapter brings more than its layers and a head, which would be saved nowhere."""
    from peft import set_peft_model_state_dict

    if left_out := state.keys() - state_of(model, name).keys():
        raise UserError(
            f"an adapter holds {min(left_out)}, trained whole beside it, which can neither lie under another one nor "
            "go over to a model with a scalar head: use adapter.beneath: merge"
        )
    set_peft_model_state_dict(model, state, adapter_name=name)


def train_tokens(model: Any) -> None:
    """Let virtual tokens that were stored train on, and a head beside them. The network that once computed them is
    gone: they train directly."""
    for key, parameter in model.named_parameters():
        if key.startswith("prompt_encoder.") or ".modules_to_save." in key:
            parameter.requires_grad_(True)


def is_stacked(model: Any) -> bool:
    """Whether other adapters lie below the model's own."""
    return any(name.startswith(BELOW) for name in model.peft_config)


def stack_new(model: Any, settings: AnyAdapter, seed: int) -> Any:
    """A new adapter over those that a model has, which are kept as they are."""
    import torch

    plain, parts = taken_apart(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = assembled(plain, [*parts, Part(_config_over(plain, settings), {})])
    mark_rates(made, settings)
    return made


def saved_form(model: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a model's own adapter as they are written, over the base as it lies in the store.

    PiSSA took directions out of the frozen weights: W - s B0 A0 + s B A is W + s [B, -B0] [A; A0], a LoRA of twice the
    rank whose scale is the same (as peft's `subtract_mutated_init`, which would leave a trained head out).
    """
    import copy

    import torch

    config = copy.deepcopy(model.peft_config[OWN])
    first: dict[str, Tensor] | None = model.__dict__.get("taken_out")
    if first is None:
        return config, state
    both = dict(state)
    for name, own in state.items():
        if ".lora_A." in name:
            both[name] = torch.cat((own, first[name].to(own)))
        elif ".lora_B." in name:
            both[name] = torch.cat((own, -first[name].to(own)), 1)
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2.0)
    return config, both


# ---------------------------------------------------------------------------------------------------- the models beside


def share_frozen(*models: nn.Module) -> int:
    """Let frozen parameters of the same name and bits be one tensor in memory; returns the bytes saved.

    Roles on one base (policy, reference, critic and reward model, each its own adapter) then hold the base once and
    compute exactly what they did apart. What is trained is never shared; sharded parameters are left alone.
    """
    import torch

    first: dict[tuple[str, torch.Size, torch.dtype], list[nn.Parameter]] = {}
    saved = 0
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or hasattr(parameter, "ds_tensor") or not parameter.numel():
                continue
            known = first.setdefault((_bare_name(name), parameter.shape, parameter.dtype), [])
            same = next((k for k in known if k.device == parameter.device and torch.equal(k, parameter)), None)
            if same is None:
                known.append(parameter)
            elif same.data_ptr() != parameter.data_ptr():
                saved += parameter.numel() * parameter.element_size()
                parameter.data = same.data
    return saved


WRAPPERS = ("base_layer", "base_model", "lm", "classifier", "policy", "value")


def _bare_name(name: str) -> str:
    """What a parameter is called without the wrappers around its model."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts).removeprefix("model.").removeprefix("model.")


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The base alone. Raises UserError for adapters that train biases: peft does not restore them (peft#493)."""
    for name, config in model.peft_config.items():
        if getattr(config, "bias", "none") != "none":
            raise UserError(
                f"adapter {name!r} trains biases, which stay in place when it is switched off, "
                "so the base is no reference: train with bias none, or start the row from a merged policy"
            )
    with model.disable_adapter():
        yield


def copy_adapter(model: PeftModel, name: str = "reference") -> None:
    """A frozen copy of the active adapter under another name."""
    import copy

    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    active = model.active_adapter
    state = {k: v.detach().clone() for k, v in get_peft_model_state_dict(model, adapter_name=active).items()}
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(name, copy.deepcopy(model.peft_config[active]))
    set_peft_model_state_dict(model, state, adapter_name=name)
    model.set_adapter(active)
    for key, parameter in model.named_parameters():
        if f".{name}." in key or key.endswith(f".{name}"):
            parameter.requires_grad_(False)


@contextmanager
def using_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Compute with another adapter; which parameters are trainable is restored afterwards."""
    active = model.active_adapter
    trainable = {key: p.requires_grad for key, p in model.named_parameters()}
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[key])
