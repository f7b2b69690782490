"""What of a model is trained: an adapter of some kind over frozen weights, or some of the weights themselves.

    adapter: {rank: 16}                                   LoRA; `kind: lora` goes without saying
    adapter: {rank: 16, initial: pissa, rate_ratio: 16}
    adapter: {kind: ia3}
    adapter: {kind: prefix, tokens: 20, projection: 256}  also prompt, p_tuning: virtual tokens before every text
    adapter: {kind: weights, train: ["*.layers.3.*", "*norm*"]}
    adapter: {rank: 8, beneath: stack}                    over a policy that is an adapter already
    adapter: {rank: 16, quantise: {kind: nf4}}            over frozen weights in 4 bits (quantise_settings.py)

No torch or peft here: plans read the settings.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.flow.config import Settings, added
from pipeline.flow.errors import UserError
from pipeline.llama.quantise_settings import AnyQuantise

TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "query_value": ["q_proj", "v_proj"],
}
_LATENT = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LATENT_TARGETS = {"attention": _LATENT, "linear": [*_LATENT, "gate_proj", "up_proj", "down_proj"]}
IA3_TARGETS, IA3_INPUTS = ["k_proj", "v_proj", "down_proj"], ["down_proj"]  # the last scales what it reads
Beneath = Literal["same", "merge", "stack"]


class AdapterSettings(Settings):
    """What every kind says."""

    virtual: ClassVar[bool] = False  # tokens of its own before every text
    told: ClassVar[tuple[str, ...]] = ("kind",)  # what a stored adapter still says of itself

    beneath: Beneath = added(
        "same",
        "What becomes of an adapter that the row starts from: `same` goes on training it and refuses settings that "
        "describe another one; `merge` adds it to the weights and `stack` keeps it, frozen, under the new one.",
    )
    quantise: AnyQuantise | None = added(
        None,
        "The frozen weights in 8 or 4 bits from here on, in every row that starts from this adapter; a reference is "
        "quantised too. Without it they are as in the row's start, and whole where `beneath: merge` adds to them.",
    )

    @property
    def silent(self) -> bool:
        """Whether a new one changes nothing before the first update, to the bit."""
        return not self.virtual

    @property
    def keeps_start(self) -> bool:
        """Whether the policy that a row starts from is, as it is stored, what is trained before the first update."""
        return self.silent and self.beneath != "merge" and self.quantise is None

    def plain(self) -> Self:
        """What is left of the settings in a stored adapter: how it was made and trained is not."""
        return type(self).model_validate({name: getattr(self, name) for name in self.told})


class LoraSettings(AdapterSettings):
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A. Biases stay as they are."""

    told: ClassVar[tuple[str, ...]] = ("kind", "rank", "alpha", "targets", "rank_stabilised", "dora")

    kind: Literal["lora"] = added("lora", "Low-rank updates of linear layers.")
    rank: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float = Field(default=32.0, gt=0, description="Scale of the update, divided by the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["attention", "linear", "query_value"] = Field(
        default="linear",
        description="Which projections get one: attention, all linear layers, or queries and values.",
    )
    rank_stabilised: bool = added(
        False, "Divide alpha by the root of the rank instead of the rank (rsLoRA: Kalajdzievski 2023, theorem 3.2)."
    )
    dora: bool = added(
        False, "Train the length of each output's weights apart from their direction (DoRA: Liu et al. 2024, eq. 5)."
    )
    rate_ratio: float = added(
        1.0, "Learning rate of B as a multiple of A's (LoRA+: Hayou et al. 2024, who advise 16).", gt=0
    )
    initial: Literal["zero", "pissa"] = added(
        "zero",
        "How it starts: `zero` without effect; `pissa` as the strongest singular directions, which are taken out of "
        "the frozen weights (PiSSA: Meng et al. 2024, eq. 2 to 4) and saved as a LoRA of twice the rank over the base.",
    )

    @property
    def silent(self) -> bool:
        return self.initial == "zero"

    def plain(self) -> LoraSettings:
        left = super().plain()
        if self.initial == "zero":
            return left
        scale = 2**0.5 if self.rank_stabilised else 2.0  # what was taken out lies beside what was trained
        return left.model_copy(update={"rank": 2 * self.rank, "alpha": scale * self.alpha})

    @model_validator(mode="after")
    def _one_start(self) -> LoraSettings:
        if self.dora and self.initial == "pissa":
            raise ValueError("dora and initial: pissa cannot be saved as one LoRA over the base: keep one of the two")
        if self.quantise and self.initial == "pissa":
            raise ValueError("initial: pissa takes directions out of the weights, which quantised ones cannot give")
        if self.beneath == "stack" and (self.dora or self.initial == "pissa"):
            raise ValueError(
                "beneath: stack needs an update that is added to what lies below, which dora and initial: pissa are "
                "not: use beneath: merge"
            )
        return self


class Ia3Settings(AdapterSettings):
    """Learned factors of keys, values and the feed-forward's inner activations (IA3: Liu et al. 2022, section 3.3)."""

    kind: Literal["ia3"]


class VirtualSettings(AdapterSettings):
    """Learned tokens before every text. The reference of a row that adds them is the policy with them as they start."""

    virtual: ClassVar[bool] = True
    told: ClassVar[tuple[str, ...]] = ("kind", "tokens")

    tokens: int = Field(default=20, ge=1, description="How many virtual tokens.")


class PrefixSettings(VirtualSettings):
    """Learned keys and values before every text in every layer (prefix tuning: Li and Liang 2021, section 4.2)."""

    kind: Literal["prefix"]
    projection: int | None = Field(
        default=None,
        ge=1,
        description="Width of the network that computes them while they are trained, dropped when saved (section 4.3); "
        "null trains them directly.",
    )


class PromptSettings(VirtualSettings):
    """Learned embeddings before every text (prompt tuning: Lester et al. 2021, section 2)."""

    kind: Literal["prompt"]
    initial: Literal["vocabulary", "random"] = Field(
        default="vocabulary", description="They start as the embeddings of tokens drawn at random, or as noise (2.1)."
    )


class PTuningSettings(VirtualSettings):
    """Learned embeddings that a small network computes while they are trained (P-tuning: Liu et al. 2021)."""

    kind: Literal["p_tuning"]
    encoder: Literal["mlp", "lstm"] = Field(
        default="mlp", description="The network: three linear layers, or a two-way LSTM of two layers and two of them."
    )
    hidden: int = Field(default=128, ge=1, description="Width of the network.")


class WeightsSettings(AdapterSettings):
    """No adapter: those of the model's own parameters train that a pattern matches; the policy is saved whole.

    A scalar head is trained whatever the patterns say.
    """

    kind: Literal["weights"]
    train: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description='Patterns of parameter names, such as "*.layers.3.*" or "*norm.weight"; `*` stands for any text.',
    )

    @model_validator(mode="after")
    def _nothing_to_stack(self) -> WeightsSettings:
        if self.beneath == "stack":
            raise ValueError("beneath: stack needs a new adapter, and kind: weights makes none: use beneath: merge")
        if self.quantise:
            raise ValueError("quantise: weights in few bits cannot be trained or saved whole: use an adapter")
        return self


KINDS: tuple[type[AdapterSettings], ...] = (
    LoraSettings, Ia3Settings, PrefixSettings, PromptSettings, PTuningSettings, WeightsSettings,
)  # fmt: skip


def following(adapter: AnyAdapter | None, start: AnyAdapter | None) -> AnyAdapter | None:
    """The adapter of a row's model, where `start` is that of what it starts from; None where there is none, or none is
    known. UserError where the row asks for another one and does not say what becomes of the first."""
    if adapter is None:
        return start
    if start is not None and adapter.beneath == "same":
        if adapter.plain() != start.plain():
            raise another_adapter(start.plain(), adapter)
        return start
    return None if isinstance(adapter, WeightsSettings) else adapter


def another_adapter(have: AnyAdapter | None, asked: AnyAdapter) -> UserError:
    return UserError(
        f"the row starts from an adapter ({_told(have)}), the plan asks for another ({_told(asked.plain())}): "
        "leave `adapter` unset to train the first one on, or say in adapter.beneath what becomes of it: merge adds "
        "it to the weights, stack keeps it frozen under the new one"
    )


def _told(settings: AnyAdapter | None) -> str:
    """The values of settings for people."""
    if settings is None:
        return "of settings that are none of ours"
    shown = settings.model_dump(exclude_defaults=True)
    return ", ".join(f"{k} {v}" for k, v in {"kind": settings.kind, **shown}.items())


def kind_name(cls: type[AdapterSettings]) -> str:
    return str(typing.get_args(cls.model_fields["kind"].annotation)[0])


def _kind_of(value: Any) -> Any:
    """LoRA goes without saying."""
    return value.get("kind", "lora") if isinstance(value, Mapping) else getattr(value, "kind", None)


if TYPE_CHECKING:
    AnyAdapter = LoraSettings | Ia3Settings | PrefixSettings | PromptSettings | PTuningSettings | WeightsSettings
else:
    AnyAdapter = Annotated[
        typing.Union[tuple(Annotated[cls, Tag(kind_name(cls))] for cls in KINDS)],  # noqa: UP007
        Discriminator(
            _kind_of,
            custom_error_type="adapter_kind",
            custom_error_message=f"kind: one of {', '.join(map(kind_name, KINDS))} was expected",
        ),
    ]


def adapter_field() -> Any:
    """The setting of a stage."""
    return Field(default=None, description="Train an adapter, or some weights, instead of all weights.")


def require_reach(experts: int, settings: AnyAdapter) -> None:
    """UserError where an adapter would quietly leave out most of a model: experts lie in one tensor."""
    if not experts:
        return
    if isinstance(settings, LoraSettings) and settings.targets == "linear":
        key, mends = "targets: linear", "set it to attention"
    elif isinstance(settings, Ia3Settings):
        key, mends = "kind: ia3", "use lora with targets: attention"
    else:
        return
    raise UserError(
        f"adapter.{key} would leave out the {experts} experts of every layer, whose weights are no linear layers; "
        f"{mends}"
    )


def require_place(option: Mapping[str, Any], settings: AnyAdapter) -> None:
    """UserError where a model's options (`pipeline/llama/options`) leave no place for an adapter."""
    latent = option.get("attention") == "latent"
    if latent and isinstance(settings, LoraSettings) and settings.targets not in LATENT_TARGETS:
        raise UserError(
            f"adapter.targets: {settings.targets} are no projections of their own under attention latent; set it to "
            f"{' or '.join(LATENT_TARGETS)}"
        )
    if latent and isinstance(settings, Ia3Settings | PrefixSettings):
        raise UserError(
            f"adapter.kind: {settings.kind} changes keys and values, which attention latent makes of other things; use "
            "lora, prompt, p_tuning or weights, or leave adapter unset"
        )
    kept = option.get("first_tokens") or 0
    if option.get("sliding_window") and isinstance(settings, VirtualSettings) and settings.tokens > kept:
        raise UserError(
            f"adapter.kind: {settings.kind} puts {settings.tokens} tokens before every text, of which sliding_window "
            f"lets go but for {kept} first_tokens; use lora, ia3 or weights"
        )


def settings_of(config: Mapping[str, Any]) -> AnyAdapter | None:
    """The settings that a peft configuration describes; None where no settings do.

    What only says how it was trained (a network that is not saved, a rate, dropout) is at its default.
    """
    kind = str(config.get("peft_type", "")).rpartition(".")[2]
    tokens = {"tokens": config.get("num_virtual_tokens")}
    if kind == "LORA":
        return _lora_of(config)
    if kind == "IA3":
        same = _names(config, "target_modules") == set(IA3_TARGETS)
        same &= _names(config, "feedforward_modules") == set(IA3_INPUTS)
        return Ia3Settings(kind="ia3") if same else None
    if kind == "PREFIX_TUNING":
        return PrefixSettings.model_validate({"kind": "prefix", **tokens})
    if kind == "PROMPT_TUNING":
        return PromptSettings.model_validate({"kind": "prompt", **tokens})
    return PTuningSettings.model_validate({"kind": "p_tuning", **tokens}) if kind == "P_TUNING" else None


def _lora_of(config: Mapping[str, Any]) -> LoraSettings | None:
    names = _names(config, "target_modules")
    known = [*TARGETS.items(), *LATENT_TARGETS.items()]
    targets = next((name for name, modules in known if set(modules) == names), None)
    if targets is None or config.get("rank_pattern") or config.get("alpha_pattern"):
        return None
    return LoraSettings.model_validate(
        {
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "targets": targets,
            "rank_stabilised": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
        }
    )


def _names(config: Mapping[str, Any], key: str) -> set[str]:
    value = config.get(key)
    return set(value) if isinstance(value, list | set | tuple) else set()
