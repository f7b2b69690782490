"""Settings of pretraining objectives: what a decoder learns to say of a window of text.

    objective: causal                                   every token from those before it
    objective: {name: prefix}                           the end of a window from its beginning
    objective: {name: fim, rate: 0.9}                   the middle from what stands around it
    objective: {name: spans, density: 0.15}             hidden spans from the rest
    objective: {name: ul2}                              a mixture of these, each behind its mode token

An objective says which control tokens it needs beyond those of chats, and how many tokens of text fit into a window
that it lays out. denoise.py has the layouts. No torch here: planning reads this.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.data.denoise import MID, MODES, PRE, SUF, TARGETS, sentinel, span_counts
from pipeline.flow.config import Settings

SENTINELS = "Hidden spans that a window may have, each with a control token of its own (T5: 100)."


class Layout(Settings):
    """What an objective needs of a tokenizer and of a window."""

    def control_tokens(self) -> tuple[str, ...]:
        return ()

    def room(self, max_tokens: int) -> int:
        """Tokens of text that fit into a window of `max_tokens`."""
        return max_tokens


class Causal(Layout):
    """Every token from those before it."""

    name: Literal["causal"] = Field(default="causal", description="Next-token prediction on every token.")


class Prefix(Layout):
    """The end of a window from its beginning."""

    name: Literal["prefix"] = Field(
        default="prefix",
        description="Loss on the suffix of a window alone; a model with prefix_attention reads the prefix in both "
        "directions (Raffel et al. 2020, section 3.2.1), any other from left to right.",
    )
    share: float = Field(
        default=0.5,
        gt=0,
        le=0.5,
        description="Mean share of a window that is predicted: from one token to twice this share, each number as "
        "likely; 0.5 cuts anywhere (Raffel et al. 2020, section 3.3.1).",
    )


class FillIn(Layout):
    """The middle of a window from what stands around it."""

    name: Literal["fim"] = Field(
        default="fim",
        description="Fill in the middle: windows cut at two random characters (between tokens where the text does not "
        "come back to the same tokens), the middle moved to the end (Bavarian et al. 2022).",
    )
    rate: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the windows that are rearranged, the others being read left to right (Bavarian et al. "
        "2022: up to 0.9 costs nothing left to right).",
    )
    spm: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the rearranged windows in the order suffix, prefix, middle; the others are in the order "
        "prefix, suffix, middle (Bavarian et al. 2022: half and half).",
    )

    def control_tokens(self) -> tuple[str, ...]:
        return (PRE, SUF, MID)

    def room(self, max_tokens: int) -> int:
        return max_tokens - 5  # bos, the three marks, eos


class Spans(Layout):
    """Hidden spans from the rest of a window."""

    name: Literal["spans"] = Field(
        default="spans",
        description="Span corruption: loss on the hidden spans, which follow the window in one decoder where T5 has an "
        "encoder and a decoder (Raffel et al. 2020).",
    )
    density: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the tokens that is hidden (Raffel et al. 2020: 0.15)."
    )
    mean_span: float = Field(
        default=3.0, ge=1, description="Mean length of a hidden span in tokens (Raffel et al. 2020: 3)."
    )
    sentinels: int = Field(default=100, ge=1, le=10_000, description=SENTINELS)

    def control_tokens(self) -> tuple[str, ...]:
        return (TARGETS, *map(sentinel, range(self.sentinels)))

    def room(self, max_tokens: int) -> int:
        return _room(max_tokens - 3, self.density, self.mean_span, self.sentinels)  # bos, TARGETS, eos


class Denoiser(Settings):
    """One way to hide tokens, behind the token of its mode."""

    mode: Literal["R", "S", "X"] = Field(
        description="Token that the window begins with: regular, sequential or extreme denoising."
    )
    density: float = Field(gt=0, lt=1, description="Share of the tokens that is hidden; under S the mean of it.")
    mean_span: float | None = Field(
        default=None, ge=1, description="Mean length of a hidden span in tokens; under S, which hides the end, none."
    )
    weight: float = Field(default=1.0, gt=0, description="How often it is drawn, in relation to the others.")

    @model_validator(mode="after")
    def _sane(self) -> Denoiser:
        if (self.mode == "S") != (self.mean_span is None):
            raise ValueError("mean_span: goes with the modes R and X, and not with S")
        if self.mode == "S" and self.density > 0.5:
            raise ValueError("density: at most 0.5 under S, where up to twice that share is hidden")
        return self


class Ul2(Layout):
    """A mixture of denoisers, each behind its mode token."""

    name: Literal["ul2"] = Field(
        default="ul2",
        description="Mixture of denoisers, drawn for every window (Tay et al. 2022); a model with prefix_attention "
        "reads what is given in both directions, any other from left to right.",
    )
    denoisers: tuple[Denoiser, ...] = Field(
        default=(
            Denoiser(mode="R", density=0.15, mean_span=3),
            Denoiser(mode="R", density=0.15, mean_span=8),
            Denoiser(mode="S", density=0.25),
            Denoiser(mode="X", density=0.5, mean_span=3),
            Denoiser(mode="X", density=0.5, mean_span=8),
            Denoiser(mode="X", density=0.15, mean_span=64),
            Denoiser(mode="X", density=0.5, mean_span=64),
        ),
        min_length=1,
        description="What is mixed (Tay et al. 2022, table 1); span lengths are cut as T5 cuts them.",
    )
    sentinels: int = Field(default=100, ge=1, le=10_000, description=SENTINELS)

    def control_tokens(self) -> tuple[str, ...]:
        return (*MODES.values(), TARGETS, *map(sentinel, range(self.sentinels)))

    def room(self, max_tokens: int) -> int:
        """The least room that any of its denoisers has, so that windows do not depend on the draw."""
        most = max_tokens - 4  # bos, mode, TARGETS, eos
        rooms = [_room(most, d.density, d.mean_span, self.sentinels) for d in self.denoisers if d.mean_span]
        return min([most, *rooms])


def _room(most: int, density: float, mean: float, sentinels: int) -> int:
    """The longest window that fits with two sentinels a span; ValueError where it needs more than there are."""
    n = most
    while n > 0 and n + 2 * span_counts(n, density, mean)[1] > most:
        n -= 1
    if n > 0 and (spans := span_counts(n, density, mean)[1]) > sentinels:
        raise ValueError(
            f"sentinels: {sentinels}, but a window of {n} tokens has {spans} hidden spans at density {density:g} and "
            f"mean_span {mean:g}; raise sentinels, or lower max_tokens"
        )
    return n


Objective = Annotated[Causal | Prefix | FillIn | Spans | Ul2, Field(discriminator="name")]


def named(value: Any) -> Any:
    """`objective: fim` is `objective: {name: fim}`."""
    return {"name": value} if isinstance(value, str) else value
