"""LoRA adapters through peft, and what stands for the reference beside them.

    model = add_lora(model, LoraSettings(rank=16), seed)     trainable adapter over frozen weights
    with adapters_off(model): ...                            the base: the reference where the start was the base itself
    copy_adapter(model, "reference"); with using_adapter(model, "reference"): ...
                                                             the reference where the row started from an adapter

No torch or peft here before a function needs them: plans read the settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "query_value": ["q_proj", "v_proj"],
}


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A. Biases stay as they are."""

    rank: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float = Field(default=32.0, gt=0, description="Scale of the update, divided by the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["attention", "linear", "query_value"] = Field(
        default="linear",
        description="Which projections get one: attention, all linear layers, or queries and values.",
    )


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


def lora_config(settings: LoraSettings, *, classifier: bool) -> Any:
    from peft import LoraConfig, TaskType

    scale: Any = settings.alpha  # peft's annotation says int, its arithmetic takes any number
    return LoraConfig(
        r=settings.rank,
        lora_alpha=scale,
        lora_dropout=settings.dropout,
        target_modules=list(TARGETS[settings.targets]),
        bias="none",
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if classifier else None,
    )


def require_linear(experts: int, targets: str) -> None:
    """UserError where "all linear layers" would quietly leave out most of a model: experts lie in one tensor."""
    if experts and targets == "linear":
        raise UserError(
            f"adapter.targets: linear would leave out the {experts} experts of every layer, whose weights are no "
            "linear layers; set it to attention"
        )


def require_projections(attention: str) -> None:
    """UserError where most of what is asked for has no place: latent attention's projections are others."""
    if attention == "latent":
        raise UserError(
            "adapter: its targets are projections of queries, keys and values, which attention latent does not have; "
            "leave adapter unset and train all weights"
        )


def add_lora(model: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze `model` and put a trainable adapter over it; a classifier's head is trained whole.

    B starts at 0, so the model computes what it did before. The same seed gives the same adapter.
    """
    import torch

    if is_adapted(model):
        raise UserError("this policy is an adapter already and is trained on as it is: leave `adapter` unset")
    require_linear(getattr(model.config, "num_local_experts", 0), settings.targets)
    require_projections(getattr(model.config, "attention", "full"))
    with quiet(), torch.random.fork_rng(devices=[]):
        from peft import get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(model, lora_config(settings, classifier=hasattr(model, "score")))


def require_same(model: nn.Module, settings: LoraSettings) -> None:
    """Raises UserError where a plan asks for another adapter than the one that the row starts from."""
    have: Any = model.active_peft_config
    found = (have.r, float(have.lora_alpha), set(have.target_modules))
    asked = (settings.rank, settings.alpha, set(TARGETS[settings.targets]))
    if found != asked:
        raise UserError(
            f"the row starts from an adapter with (rank, alpha, targets) {found[:2]} {sorted(found[2])} and the plan "
            f"asks for {asked[:2]} {sorted(asked[2])}: an adapter is trained on as it is, leave `adapter` unset"
        )


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
