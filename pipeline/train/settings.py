"""What a training row can set. Pydantic only: planning a run imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.flow.config import Settings, added, not_identity
from pipeline.flow.errors import UserError


class TrainSettings(Settings):
    """Optimiser, schedule and batch of one training row."""

    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training records; a fraction is allowed.")
    steps: int | None = Field(
        default=None, ge=1, le=10**9, description="Optimiser steps; where set, it decides instead of `epochs`."
    )
    batch: int = Field(default=32, ge=1, description="Records an optimiser step, over all ranks together.")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens an optimiser step at most, over all ranks; where set, it replaces `batch`.",
    )
    batch_start: int | None = added(
        None,
        "Tokens of the first optimiser step at most, where steps grow to `batch_tokens` (Brown et al. 2020, appendix "
        "B: 32,000 at first).",
        ge=1,
    )
    batch_growth: int | None = added(
        None,
        "Tokens in the course of which steps grow linearly from `batch_start` to `batch_tokens` (Brown et al. 2020, "
        "appendix B: 4 to 12 billion).",
        ge=1,
    )
    token_budget: int = not_identity(
        8192, "Tokens a forward pass at most; it decides memory and speed, never the result.", ge=1
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32",
        description="bf16 computes in bfloat16 over float32 master weights; auto is bf16 where this machine has "
        "arithmetic for it, and fp32 elsewhere.",
    )
    checkpointing: bool = not_identity(
        False, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = added(
        "adamw",
        "adamw8bit keeps both moments in 8 bits (Dettmers et al. 2022b, by bitsandbytes); adafactor keeps sums of rows "
        "and columns of the second and no first, moves by shares of a weight's size, and reads neither betas nor eps "
        "(Shazeer and Stern 2018, algorithms 4 and 5).",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's two decay rates.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon, outside the square root.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's decay of matrices and embeddings; norms and biases have none."
    )
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the whole gradient; 0 leaves it alone.")
    warmup: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the steps in which the rate climbs from zero to its peak.",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine",
        description="How the rate falls after warm-up; wsd stays at the peak and falls exponentially in the last steps "
        "(Hu et al. 2024).",
    )
    cooldown: float = added(
        0.1, "Share of the steps in which the rate falls under wsd (Hu et al. 2024: a tenth is enough).", gt=0, lt=1
    )
    final_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Share of the peak rate that the last step uses."
    )
    skip_spikes: float | None = added(
        None,
        "A step whose loss stands more than this many standard deviations above the mean of the steps before it "
        "changes neither weights nor moments (OLMo 2, 2025: 6); without it no step is skipped.",
        gt=0,
    )
    spike_window: int = added(
        128,
        "Steps before a step that its loss is compared with, skipped ones too; none is skipped before half as many are "
        "known (OLMo 2, 2025: 128).",
        ge=4,
    )
    evaluations: int = Field(
        default=4,
        ge=0,
        description="How often held-out records are evaluated, evenly spaced, the last at the end.",
    )
    keep: Literal["best", "last"] = Field(
        default="best", description="Weights of the best evaluation, or those of the last step."
    )

    checkpoint_every: int = not_identity(
        100, "Optimiser steps (iterations in PPO) between two checkpoints inside the row; 0 writes none.", ge=0
    )
    keep_last: int = not_identity(2, "Checkpoints inside the row that stay; the best weights are in each.", ge=1)

    @model_validator(mode="after")
    def _sane(self) -> TrainSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: both must be in [0, 1), not {list(self.betas)}")
        self._check_growth()
        if self.schedule != "wsd" and self.cooldown != 0.1:
            raise ValueError(f"cooldown: has no effect under the schedule {self.schedule}; set schedule to wsd")
        if self.schedule == "wsd" and not self.final_fraction:
            raise ValueError("final_fraction: must be above 0 under wsd, where the rate falls exponentially")
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError("cooldown: warmup and cooldown together are more than all steps")
        if self.skip_spikes is None and self.spike_window != 128:
            raise ValueError("spike_window: has no effect without skip_spikes")
        return self

    def _check_growth(self) -> None:
        if (self.batch_start is None) != (self.batch_growth is None):
            missing = "batch_start" if self.batch_start is None else "batch_growth"
            raise ValueError(f"{missing}: batches grow by batch_start and batch_growth together")
        if self.batch_start is None:
            return
        if self.batch_tokens is None or self.batch_start >= self.batch_tokens:
            raise ValueError(f"batch_start: must be less than batch_tokens, which is {self.batch_tokens}")


def require_budget(
    stage: str, budget: float | None, train: TrainSettings | None, *, dev: bool, scored: bool, cut: bool = False
) -> None:
    """UserError where a KL budget would choose nothing, or could not be held to. For a stage's `check`.

    dev, scored   whether there are prompts to look at, and a reward that chooses among the looks
    cut           whether answers are drawn from another distribution than the policy's, so that their KL is not known
    """
    if not budget:
        return
    key = f"{stage}.kl_budget"
    if not dev:
        raise UserError(f"{key}: chooses weights by `dev`, which is not given")
    if not scored:
        raise UserError(f"{key}: chooses weights by a reward, and none scores `dev`: wire reward or heldout_reward")
    if train is None or train.keep != "best" or not train.evaluations:
        raise UserError(
            f"{key}: chooses weights among the looks at `dev`: set train.keep to best and train.evaluations above 0"
        )
    if cut:
        raise UserError(
            f"{key}: with top_k, top_p, min_p, min_new_tokens or repetition_penalty in {stage}.sampling the KL of the "
            "answers to `dev` is not known; leave those at their defaults, or kl_budget out"
        )
