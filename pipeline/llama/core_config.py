"""The config of a model with options beyond plain LLaMA, and the way to and from the configs that say the same.

    config = new_config(shape)          LlamaConfig where that says it all, CoreConfig otherwise
    config.save_pretrained(directory)   as "llama", "mistral" or "mixtral" where plain transformers computes the same
    core_config(theirs)                 a CoreConfig of transformers' MixtralConfig or MistralConfig

In memory a model of `core.py` always has a CoreConfig; only files say it in another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, MixtralConfig

from pipeline.llama.options import ACTIVATIONS, DEFAULTS, GATED, MODEL_TYPE, chosen, form, refuse

PLAIN: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig}
OF_THE_CLASS = {"model_type", "transformers_version"}


@strict
class CoreConfig(LlamaConfig):
    """LLaMA's fields and the options of `pipeline/llama/options`, each at plain LLaMA by default."""

    model_type = MODEL_TYPE

    norm: str = "rms"
    norm_placement: str = "pre"
    feed_forward: str = "swiglu"
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    positions: str = "rotary"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    attention: str = "full"
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | None = None
    first_tokens: int = 0
    prefix_attention: bool = False
    truncated_basis_low: float = 0.0
    truncated_basis_high: float = 0.0
    truncated_basis_value: float = 0.0
    rerope_window: int | None = None
    rerope_factor: float | None = None
    rerope_trained: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse(vars(self))
        if self.attention == "latent":
            self.head_dim = self.qk_rope_head_dim  # what rotary positions turn
        self.hidden_act = ACTIVATIONS[self.feed_forward]
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str] | None:
        """For transformers' caches, which drop what a window hides: first tokens stay visible."""
        return ["full_attention"] * self.num_hidden_layers if self.first_tokens else None

    def plain(self) -> Any:
        """The config under which plain transformers computes the same, or this one."""
        kind = form(self.to_dict())
        if kind == MODEL_TYPE:
            return self
        cls = PLAIN[kind]
        kept = cls().to_dict().keys() | {"id2label", "label2id", "architectures", "dtype", "problem_type"}
        facts = {k: v for k, v in self.to_dict().items() if k in kept - OF_THE_CLASS}
        named = [name.replace("Core", cls.__name__.removesuffix("Config"), 1) for name in self.architectures or ()]
        return cls.from_dict({**facts, "architectures": named or None})

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        plain = self.plain()
        if plain is self:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        else:
            plain.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def new_config(shape: Mapping[str, Any], **more: Any) -> LlamaConfig:
    """From the arguments that `ModelSettings.llama` gives."""
    if form(shape) != "llama":
        return CoreConfig(**shape, **more)
    act = ACTIVATIONS[chosen(shape)["feed_forward"]]
    return LlamaConfig(**{k: v for k, v in shape.items() if k not in DEFAULTS}, hidden_act=act, **more)


def core_config(theirs: Any) -> CoreConfig:
    """The same model as a CoreConfig. Whether it can be said is `check_config`'s question."""
    if isinstance(theirs, CoreConfig):
        return theirs
    facts = theirs.to_dict()
    known = CoreConfig().to_dict().keys() | {"id2label", "label2id", "architectures", "dtype"}
    kept = {k: v for k, v in facts.items() if k in known - OF_THE_CLASS}
    gate = next(name for name, act in GATED.items() if act == facts["hidden_act"].replace("swish", "silu"))
    return CoreConfig.from_dict({**kept, "feed_forward": gate})
