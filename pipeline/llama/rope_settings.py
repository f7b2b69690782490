"""How a rotary model is stretched over longer contexts: settings, and what a config.json may say. No torch.

    {rope_type: linear, factor: 2}                     position interpolation
    {rope_theta: 500000}, {ntk_factor: 4}              another base, given or chosen by the NTK-aware formula
    {rope_type: dynamic, factor: 2}                    a base that grows with the position
    {rope_type: yarn, factor: 4}, {rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4}

Names and meanings are those of transformers' `rope_parameters`, which is what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.flow.config import Settings, added

MOST_POSITIONS = 1 << 26
# By type the fields that it takes beside rope_theta, those that it cannot do without first.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL = {
    "default": ("ntk_factor",),
    "linear": (),
    "dynamic": (),
    "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("original_max_position_embeddings",),
}
KEEPS_ORIGINAL = ("yarn", "llama3")  # types whose parameters name the length of the first training


class RopeSettings(Settings):
    """Rotary frequencies. The base and the original length default to those of the model that is stretched."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = Field(
        default="default",
        description="default (Su et al. 2021), linear: position interpolation (Chen et al. 2023, section 2.3), "
        "dynamic: NTK-aware, by position (transformers' dynamic), yarn (Peng et al. 2023), llama3 (as published with "
        "Llama 3.1).",
    )
    rope_theta: float | None = Field(default=None, gt=0, description="Base of the rotary wavelengths.")
    ntk_factor: float | None = Field(
        default=None,
        ge=1,
        description="Base times this to the power d / (d - 2), d the head size: the slowest pair is slowed by the "
        "factor, the fastest not at all (NTK-aware scaling; Peng et al. 2023, equation 16).",
    )
    factor: float | None = Field(default=None, ge=1, description="How many times longer the context becomes.")
    original_max_position_embeddings: int | None = Field(
        default=None, ge=1, le=MOST_POSITIONS, description="Length of the training before it was stretched."
    )
    attention_factor: float | None = Field(
        default=None,
        gt=0,
        description="Of yarn: cosines and sines times this; 0.1 ln(factor) + 1 by default (Peng et al. 2023, eq. 22).",
    )
    beta_fast: float | None = Field(
        default=None, gt=0, description="Of yarn: pairs that turn more often within the original length stay; 32."
    )
    beta_slow: float | None = Field(
        default=None, gt=0, description="Of yarn: pairs that turn less often there are interpolated whole; 1."
    )
    truncate: bool | None = Field(
        default=None, description="Of yarn: whether the range between them is widened to whole pairs; true."
    )
    low_freq_factor: float | None = Field(
        default=None, gt=0, description="Of llama3: pairs that turn less often are interpolated whole."
    )
    high_freq_factor: float | None = Field(
        default=None, gt=0, description="Of llama3: pairs that turn more often stay."
    )

    @model_validator(mode="after")
    def _fits(self) -> RopeSettings:
        kind, given = self.rope_type, self.model_dump(exclude={"rope_type", "rope_theta"}, exclude_none=True)
        known = NEEDED[kind] + OPTIONAL[kind]
        if unused := [name for name in given if name not in known]:
            may = f"it takes {', '.join(known)}" if known else "it takes no fields of its own"
            raise ValueError(f"{unused[0]} does nothing under rope_type {kind}: {may}")
        if missing := [name for name in NEEDED[kind] if name not in given]:
            raise ValueError(f"rope_type {kind} needs {missing[0]}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError(f"beta_fast {self.beta_fast or 32:g} must be above beta_slow {self.beta_slow or 1:g}")
        return self

    def parameters(self, theta: float, trained: int, size: int) -> dict[str, Any]:
        """transformers' `rope_parameters` over a model of that base, length and head size."""
        own = self.model_dump(exclude={"ntk_factor"}, exclude_none=True)
        theta = own.get("rope_theta", theta)
        own["rope_theta"] = ntk_theta(theta, self.ntk_factor, size) if self.ntk_factor else theta
        if self.rope_type in KEEPS_ORIGINAL:
            own.setdefault("original_max_position_embeddings", trained)
        return own


class PositionSettings(Settings):
    """All that may be said about a model's rotary positions."""

    rope_parameters: RopeSettings | None = added(None, "Rotary frequencies of another kind.")
    truncated_basis_high: float | None = added(
        None,
        "Pairs that turn at least so many radians a token stay, others are truncated (Pal et al. 2023, truncated "
        "basis); 2 pi / L keeps those that turn once within L tokens.",
        gt=0,
        le=1,
    )
    truncated_basis_low: float | None = added(
        None, "Pairs that turn at most so many radians a token stand still; 0 by default.", ge=0, le=1
    )
    truncated_basis_value: float | None = added(
        None, "What the pairs between both turn by, radians a token; 0 by default.", ge=0, le=1
    )
    rerope_window: int | None = added(
        None, "Keys at this distance and beyond are seen at this distance (ReRoPE: Su 2023).", ge=1, le=MOST_POSITIONS
    )
    rerope_factor: float | None = added(
        None, "Or, beyond it, at distances that grow so many times slower (leaky ReRoPE).", ge=1
    )
    rerope_trained: int | None = added(
        None, "Queries at position m are scaled by max(1, log(m + 1) / log(this)), the trained length (Su 2023).", ge=2
    )

    def beyond_transformers(self) -> dict[str, Any]:
        """Fields of `CoreConfig` that are set."""
        return self.model_dump(exclude_none=True, include=set(PositionSettings.model_fields) - {"rope_parameters"})


class ContextSettings(PositionSettings):
    """How the positions of the model that a row starts from are changed; what is not given stays."""

    max_position_embeddings: int | None = Field(
        default=None, ge=1, le=MOST_POSITIONS, description="Longest context promised from now on."
    )

    @model_validator(mode="after")
    def _says_something(self) -> ContextSettings:
        if self.max_position_embeddings and self.rope_parameters and self.rope_parameters.rope_type == "dynamic":
            raise ValueError(
                "max_position_embeddings is what rope_type dynamic takes for the trained length: leave it as it was"
            )
        return self


def ntk_theta(theta: float, factor: float, size: int) -> float:
    """The base under which the slowest of size / 2 pairs turns `factor` times slower: theta factor^(d / (d - 2))."""
    if size <= 2:
        raise ValueError(f"heads of {size} numbers have one pair, whose speed no base changes")
    return theta * factor ** (size / (size - 2))


def rope_fields(kind: str) -> set[str] | None:
    """Keys that `rope_parameters` of this type may have, None for a type that is not known."""
    if kind not in NEEDED:
        return None
    return {"rope_type", "type", "rope_theta", *NEEDED[kind], *OPTIONAL[kind]} - {"ntk_factor"}


def rope_type(rope: Mapping[str, Any]) -> Any:
    """By its name, or by the one that it had before."""
    return rope.get("rope_type", rope.get("type", "default"))
