"""The reward model: a scalar at the last real token, trained on human comparisons (Bradley-Terry).

It starts from the SFT policy. All pairs of a ranking share one computation of the prompt and of each completion.
Afterwards scores are put on a scale with mean 0 and variance 1 over the policy's own answers: the scale goes into
the head's weight, the shift into the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from pipeline.flow.artifacts import Comparisons, Policy, Prompts, RewardModel
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapter_settings import AnyAdapter, adapter_field, following
from pipeline.rollout.engine import require_room
from pipeline.train.settings import TrainSettings


class Reward(Stage):
    name = "reward"
    version = 1
    sources = ("data", "llama", "train", "algo", "rollout")

    class Config(Settings):
        weight_by: Literal["pair", "prompt"] = Field(
            default="pair", description="Every pair counts 1, or 1/C(K,2) so that every prompt counts 1 (InstructGPT)."
        )
        part: tuple[float, float] | None = Field(
            default=None,
            description="Use this share of the comparisons, such as [0.0, 0.5], cut by a hash of the first turn: "
            "reward models on disjoint parts never see the same prompt.",
        )
        centring: float = Field(
            default=0.0, ge=0, description="Weight of (better + worse)^2, which keeps raw scores around 0."
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer ones are dropped."
        )
        normalise_prompts: int = Field(
            default=256,
            ge=2,
            description="Prompts that the policy answers to set the scale of scores (N-details: 256).",
        )
        max_new_tokens: int = Field(default=64, ge=1, description="Longest of those answers.")
        adapter: AnyAdapter | None = adapter_field()
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=3e-4, batch=32, epochs=1, weight_decay=0.01),
            description="Optimiser, schedule and batches; a record is a comparison.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        comparisons: Comparisons
        heldout: Comparisons | None = None
        prompts: Prompts | None = None

    @dataclass
    class Outputs:
        model: RewardModel

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        if config.part and not 0 <= config.part[0] < config.part[1] <= 1:
            raise UserError(f"reward.part: expected two shares between 0 and 1, not {list(config.part)}")
        if "prompts" in given:
            require_room("reward.max_new_tokens", config.max_new_tokens, config.max_tokens)

    headline = ("heldout_accuracy", "loss", "tokens")

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> AnyAdapter | None:
        return following(config.adapter, starts.get("policy"))

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.groups import comparison_groups
        from pipeline.data.reader import Reader
        from pipeline.evaluate.scorecard import wilson
        from pipeline.llama.adapters import told_share
        from pipeline.llama.open import open_frozen, open_trainable_classifier
        from pipeline.llama.save import save_policy
        from pipeline.rollout.collect import encode_prompts
        from pipeline.rollout.engine import SamplingSettings
        from pipeline.rollout.noise import NoiseKey
        from pipeline.rollout.reward import write_probe
        from pipeline.rollout.scale import normalise
        from pipeline.train import strategy
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import pairwise_ranking, weigh_pairs

        config: Reward.Config = self.config
        scorer = open_trainable_classifier(inputs.policy, config.adapter, workspace.seed)
        share = told_share(scorer.model, config.adapter, workspace)
        reader = Reader(workspace)
        encode = lambda records, slot: comparison_groups(records, scorer.chat, config.max_tokens).required(
            slot, config.max_tokens
        )
        if config.part and inputs.comparisons.part:
            raise UserError("reward.part: the source of the comparisons names a part already; keep one of the two")
        given = replace(inputs.comparisons, part=config.part) if config.part else inputs.comparisons
        comparisons = reader.read("comparisons", given, "comparisons")
        encoded = encode(comparisons, "comparisons")
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        weigh = weigh_pairs(config.weight_by)
        plan = Plan(encoded.groups, config.train, seed=workspace.seed, strategy=ranks, weigh=weigh)
        loss = pairwise_ranking(config.weight_by, config.centring)
        trainer = Trainer(scorer.module, loss, config.train, ranks, total=len(plan), seed=workspace.seed)
        pairs, evaluate = 0, None
        if inputs.heldout:
            heldout = reader.read("heldout", inputs.heldout, "comparisons")
            held = encode(heldout, "heldout")
            pairs = sum(len(heldout[i].pairs()) for i in held.kept)
            mine = trainer.share(held.groups)
            evaluate = lambda: trainer.evaluate(mine)
        outcome = fit(trainer, plan, workspace, evaluate=evaluate, figures=("loss", "accuracy", "margin"))
        sampling = SamplingSettings(samples=1, max_new_tokens=config.max_new_tokens)
        prompts = None
        if inputs.prompts:
            found = reader.read("prompts", inputs.prompts, "prompts")[: config.normalise_prompts]
            prompts = encode_prompts(found, scorer.chat, config.max_tokens, config.max_new_tokens)
        policy = open_frozen(inputs.policy) if prompts else None
        if policy:
            policy.module.to(ranks.device)
        with trainer.whole():  # the scale goes into the head
            scale = normalise(
                scorer,
                policy=policy,
                prompts=prompts,
                sampling=sampling,
                groups=encoded.groups,
                key=NoiseKey(workspace.seed, workspace.stage),
                token_budget=config.train.token_budget,
                ranks=ranks,
            )
            save_policy(scorer, workspace, "model")
            workspace.lineage("model", shift=scale.shift, normalised_on=scale.on)
            write_probe(scorer.module, encoded.groups, workspace.slot("model"))
        accuracy = outcome.kept.get("accuracy")
        interval = None if accuracy is None else wilson(accuracy * pairs, pairs)
        return {
            "loss": outcome.last.get("loss"),
            "accuracy": outcome.last.get("accuracy"),
            "heldout_loss": outcome.kept.get("loss"),
            "heldout_accuracy": accuracy,
            "heldout_accuracy_interval": interval.to_json() if interval else None,
            "heldout_length_accuracy": outcome.kept.get("length_accuracy"),
            "heldout_pairs": pairs,
            "kept_step": outcome.kept_step,
            "comparisons": len(encoded.groups),
            "ties_skipped": sum(c.ties() for c in comparisons),
            "dropped_too_long": encoded.dropped,
            "score_mean_before": scale.mean,
            "score_std_before": scale.std,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            **share,
            "read": reader.counts,
        }
