"""Direct preference optimisation (Rafailov et al. 2023): from comparisons straight to a policy.

The reference is the policy that the row starts from. Its log-probs are computed once, on the forests of the first
pass, so that the first loss is exactly ln 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field

from pipeline.flow.artifacts import Comparisons, Policy
from pipeline.flow.config import Settings
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapters import LoraSettings
from pipeline.train.settings import TrainSettings


class Dpo(Stage):
    name = "dpo"
    version = 1
    sources = ("data", "llama", "train", "algo")

    class Config(Settings):
        beta: float = Field(default=0.1, gt=0, description="Strength of the pull to the reference.")
        label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Assumed share of flipped labels.")
        sft_coefficient: float = Field(
            default=0.0, ge=0, description="Weight of the chosen answer's own loss (nats a token) beside the pair's."
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer pairs are dropped."
        )
        adapter: LoraSettings | None = Field(default=None, description="Train a LoRA adapter instead of all weights.")
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=1e-4, batch=64, epochs=1, betas=(0.9, 0.999)),
            description="Optimiser, schedule and batches; a record is a comparison.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        comparisons: Comparisons
        heldout: Comparisons | None = None

    @dataclass
    class Outputs:
        policy: Policy

    headline = ("loss", "accuracy", "margin", "tokens")

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.algo.preference import make_loss
        from pipeline.data.groups import comparison_groups
        from pipeline.data.reader import Reader
        from pipeline.llama.open import open_trainable, save_policy
        from pipeline.train import strategy
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import preference, weigh_pairs
        from pipeline.train.reference import held_with_reference, require_start, with_reference, without_dropout

        config: Dpo.Config = self.config
        reader = Reader(workspace)
        policy = open_trainable(inputs.policy, config.adapter, workspace.seed)
        if without_dropout(policy.module):
            workspace.say("dropout is off: the ratio to the reference would measure it")
        encode = lambda slot, artifact: comparison_groups(
            reader.read(slot, artifact, "comparisons"), policy.chat, config.max_tokens
        ).required(slot, config.max_tokens)
        encoded = encode("comparisons", inputs.comparisons)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        loss = preference(
            make_loss("sigmoid", beta=config.beta, label_smoothing=config.label_smoothing), config.sft_coefficient
        )
        make_plan = partial(Plan, settings=config.train, seed=workspace.seed, strategy=ranks, weigh=weigh_pairs("pair"))
        plan = make_plan(encoded.groups)
        trainer = Trainer(policy.module, loss, config.train, ranks, total=len(plan), seed=workspace.seed)
        plan = make_plan(with_reference(trainer, plan, workspace))
        require_start(trainer, plan.batch(0).groups, math.log(2), config.train.precision)
        evaluate = None
        if inputs.heldout:
            held = held_with_reference(trainer, encode("heldout", inputs.heldout).groups, workspace)
            evaluate = lambda: trainer.evaluate(held)
        outcome = fit(trainer, plan, workspace, evaluate=evaluate, figures=("loss", "accuracy", "margin"))
        save_policy(policy, workspace)
        return {
            "loss": outcome.last.get("loss"),
            "accuracy": outcome.last.get("accuracy"),
            "margin": outcome.last.get("margin"),
            "heldout_loss": outcome.kept.get("loss"),
            "heldout_accuracy": outcome.kept.get("accuracy"),
            "comparisons": len(plan.groups),
            "dropped_too_long": encoded.dropped,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "read": reader.counts,
        }
