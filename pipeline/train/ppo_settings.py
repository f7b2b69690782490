"""What reinforcement learning on a policy can set. Pydantic only: planning a run imports no torch.

The defaults are those of InstructGPT's PPO as the public implementations read it (Huang et al. 2024, "The N+
implementation details of RLHF with PPO"), and what the quickstart measures.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.flow.config import Settings

NEED_GROUPS = ("rloo", "grpo")  # advantages that compare answers to one prompt
LARGEST_ERROR = 0.2  # of the KL against its target, to which adaptive control clips it (Ziegler et al. 2019)


class KlSettings(Settings):
    """The price of moving away from the reference."""

    coefficient: float = Field(
        default=0.1, ge=0, description="Reward lost for each nat (beta); where `control` moves it, its start."
    )
    where: Literal["reward", "loss"] = Field(
        default="reward",
        description="Taken off the reward token by token (InstructGPT), or added to the loss with its gradient (GRPO).",
    )
    estimator: Literal["k1", "k2", "k3", "exact"] = Field(
        default="k1",
        description="From the sampled token (Schulman 2020), or exact over the vocabulary; its gradient is that of the "
        "KL for k1 in the reward, for k2 and exact in the loss.",
    )
    control: Literal["fixed", "adaptive", "band"] = Field(
        default="fixed", description="Whether the coefficient stays, follows `target`, or is kept within `band`."
    )
    target: float = Field(default=6.0, gt=0, description="Nats a response that adaptive control aims for (Ziegler).")
    horizon: float = Field(default=10_000, gt=0, description="Responses over which adaptive control acts.")
    band: tuple[float, float] = Field(
        default=(4.0, 9.0),
        description="Nats a response; above it the coefficient doubles, below it halves (Schulman et al. 2017).",
    )
    stop: float | None = Field(
        default=None,
        gt=0,
        description="End an iteration's updates after the one that found the policy so many nats a token away from the "
        "one that sampled (after OpenAI Spinning Up, which looks before it leaps).",
    )

    @model_validator(mode="after")
    def _sane(self) -> KlSettings:
        if not 0 <= self.band[0] < self.band[1]:
            raise ValueError(f"band: expected two numbers of nats, the lower first, not {list(self.band)}")
        return self

    def controller(self) -> dict[str, float | str]:
        """The state that `algo.kl.controller` starts from."""
        fields: dict[str, dict[str, float]] = {
            "fixed": {},
            "adaptive": {"target": self.target, "horizon": self.horizon},
            "band": {"low": self.band[0], "high": self.band[1]},
        }
        return {"kind": self.control, "coefficient": self.coefficient, **fields[self.control]}


class CriticSettings(Settings):
    """The value model, where the advantages need one."""

    start: Literal["reward", "policy", "shared"] = Field(
        default="reward",
        description="Copy of the reward model (InstructGPT), of the policy under a new head, or a head on the policy's "
        "own trunk.",
    )
    warmup: int = Field(default=0, ge=0, description="Iterations that train the critic alone before the policy moves.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Its own peak rate; null takes train.learning_rate."
    )


class ReferenceSettings(Settings):
    """Whom the KL penalty compares with."""

    kind: Literal["start", "average", "refreshed"] = Field(
        default="start",
        description="The policy that the row starts from, a moving average of the policy (WARP, Rame et al. 2024), or "
        "a copy taken again and again.",
    )
    decay: float = Field(default=0.99, ge=0, lt=1, description="Of the moving average, an iteration.")
    every: int = Field(default=8, ge=1, description="Iterations between two copies.")


class MixSettings(Settings):
    """Other losses in every update, so that the policy keeps what it knows."""

    pretraining: float = Field(
        default=0.0, ge=0, description="Weight of the loss on `documents` a token (PPO-ptx, InstructGPT eq. 2)."
    )
    sft: float = Field(default=0.0, ge=0, description="Weight of the loss on `conversations` a token.")
    batch: int = Field(default=8, ge=1, description="Records of each in an update.")


class ImportanceSettings(Settings):
    """What to do where the sampler's log-probs differ from the trainer's; the difference is always logged."""

    correct: bool = Field(
        default=False, description="Weigh each token's loss by trainer over sampler probability (Yao et al. 2025)."
    )
    cap: float = Field(default=2.0, ge=1, description="Largest weight.")


class PpoSettings(Settings):
    """The algorithm between sampling and saving."""

    epochs: int = Field(default=2, ge=1, description="Passes over an iteration's samples.")
    minibatch: int = Field(default=64, ge=1, description="Samples an update, in whole prompt groups.")
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = Field(
        default="gae",
        description="GAE with a critic (Schulman et al. 2016), or without one: leave-one-out (Ahmadian et al. 2024), "
        "group-relative (Shao et al. 2024), REINFORCE++ (Hu 2025).",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="Discount of later rewards.")
    lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda (Schulman et al. 2016).")
    value_lam: float | None = Field(
        default=None, ge=0, le=1, description="Lambda of the returns that the critic learns; null takes lam (VC-PPO)."
    )
    divide: bool = Field(
        default=True, description="grpo: over the group's standard deviation; false is Dr. GRPO (Liu et al. 2025)."
    )
    whiten: bool | None = Field(
        default=None, description="Advantages to mean 0 and variance 1 over the iteration; null: gae and reinforce++."
    )
    clip: float = Field(default=0.2, gt=0, description="How far a probability ratio may fall before it is clipped.")
    clip_high: float | None = Field(
        default=None, gt=0, description="How far it may rise; null is the same (clip-higher: DAPO, Yu et al. 2025)."
    )
    dual_clip: float | None = Field(
        default=None, gt=1, description="Bound of the loss where the advantage is negative, times it (Ye et al. 2020)."
    )
    value_clip: float | None = Field(default=0.2, gt=0, description="The range for values; null does not clip.")
    value_coefficient: float = Field(default=1.0, ge=0, description="Weight of the value loss.")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
    average_over: Literal["tokens", "answers"] = Field(
        default="tokens",
        description="Every token of an update counts the same (DAPO), or every answer, whatever its length (GRPO).",
    )
    kl: KlSettings = Field(default=KlSettings(), description="The KL penalty.")
    critic: CriticSettings = Field(default=CriticSettings(), description="The value model.")
    reference: ReferenceSettings = Field(default=ReferenceSettings(), description="Whom the KL penalty compares with.")
    importance: ImportanceSettings = Field(default=ImportanceSettings(), description="Sampler against trainer.")
    mix: MixSettings = Field(default=MixSettings(), description="Losses on other records in every update.")
    average: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay an update of a moving average of the policy, written as the output `average`.",
    )

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def whitens(self) -> bool:
        return self.advantage in ("gae", "reinforce++") if self.whiten is None else self.whiten

    def cautions(self) -> list[str]:
        """What a user should know about these settings, a sentence each."""
        said = []
        if self.kl.where == "loss" and self.kl.estimator in ("k1", "k3"):
            wrong = {
                "k1": "in the loss k1 has a gradient of expectation 0: it holds the policy back by nothing",
                "k3": "in the loss k3 has the gradient of KL(reference || policy), not of KL(policy || reference)",
            }
            said.append(f"kl: {wrong[self.kl.estimator]}; use k2 or exact")
        if self.kl.where == "loss" and self.epochs > 1 and self.kl.estimator != "exact":
            said.append("kl: from the second epoch on, samples are no longer the policy's, so the estimate is biased")
        if self.kl.where == "reward" and self.kl.estimator != "k1":
            said.append(
                f"kl: in the reward the gradient of {self.kl.estimator} is not that of the KL; use k1, or where: loss"
            )
        if self.kl.control != "fixed" and not self.kl.coefficient:
            said.append(f"kl.control is {self.kl.control}, which multiplies kl.coefficient: from 0 it never moves")
        return said + [f"{name} is set, but has no effect: {why}" for name, why in self._idle()]

    def _idle(self) -> list[tuple[str, str]]:
        """Settings that differ from their defaults and do nothing beside the others."""
        groups = self.advantage in NEED_GROUPS
        kinds: list[tuple[Any, str, tuple[str, ...], bool, str]] = [
            (self, "", ("lam", "value_lam", "value_clip", "value_coefficient"), self.has_critic, "there is no critic"),
            (self, "", ("critic",), self.has_critic, f"advantage {self.advantage} needs no critic"),
            (self, "", ("gamma",), not groups, f"{self.advantage} takes an answer's reward as a whole"),
            (self, "", ("divide",), self.advantage == "grpo", "it belongs to grpo"),
            (self.kl, "kl.", ("target", "horizon"), self.kl.control == "adaptive", "kl.control is not adaptive"),
            (self.kl, "kl.", ("band",), self.kl.control == "band", "kl.control is not band"),
            (
                self.reference,
                "reference.",
                ("decay",),
                self.reference.kind == "average",
                "reference.kind is not average",
            ),
            (self.reference, "reference.", ("every",), self.reference.kind == "refreshed", "kind is not refreshed"),
            (self.importance, "importance.", ("cap",), self.importance.correct, "importance.correct is false"),
            (self.mix, "mix.", ("batch",), bool(self.mix.pretraining or self.mix.sft), "no other loss has a weight"),
        ]
        return [
            (prefix + name, why)
            for owner, prefix, names, used, why in kinds
            for name in names
            if not used and getattr(owner, name) != type(owner).model_fields[name].default
        ]
