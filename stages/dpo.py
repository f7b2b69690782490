"""Preference optimisation without a reward model: from comparisons, or from rated answers, straight to a policy.

DPO (Rafailov et al. 2023) and its family; pipeline/algo/preference.py lists them with their formulas. The reference is
the policy that the row starts from. Its log-probs are computed once, on the forests of the first pass, so that the
first loss is exactly what policy and reference being equal makes it: ln 2 for DPO.

    dpo: {beta: 0.1}                                  DPO; short for {loss: {beta: 0.1}}
    dpo: {loss: {name: simpo, beta: 2.0, gamma: 1.0}}
    dpo: {loss: {name: kto, undesirable_weight: 1.5}} with `rated`, or with `comparisons`, which are split
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field, model_validator

from pipeline.flow.artifacts import Comparisons, Judge, Policy, Prompts, Rated, RewardModel
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapter_settings import AnyAdapter, adapter_field, following
from pipeline.rollout.engine import require_room
from pipeline.train.losses import AnyLoss, default_loss
from pipeline.train.settings import TrainSettings, require_budget

SHORT = ("beta", "label_smoothing", "sft_coefficient")  # of the loss's own settings, as they are most often set
FIGURES = ("loss", "accuracy", "margin", "reward_desirable", "reward_undesirable", "reference_point")


class Dpo(Stage):
    name = "dpo"
    version = 1
    sources = ("data", "llama", "train", "algo", "rollout", "evaluate")

    class Config(Settings):
        loss: AnyLoss = Field(
            default=default_loss("sigmoid"),
            description="What is minimised: a loss by name with its hyperparameters; beta, label_smoothing and "
            "sft_coefficient may also stand beside it, where null leaves them to the loss.",
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer pairs are dropped."
        )
        max_new_tokens: int = Field(default=64, ge=1, description="Longest answer to the prompts of `dev`.")
        kl_budget: float | None = Field(
            default=None, gt=0, description="Nats a response beyond which no weights are kept as the best on `dev`."
        )
        adapter: AnyAdapter | None = adapter_field()
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=1e-4, batch=64, epochs=1, betas=(0.9, 0.999)),
            description="Optimiser, schedule and batches; a record is a comparison, or a rated answer.",
        )

        @model_validator(mode="before")
        @classmethod
        def _short(cls, values: Any) -> Any:
            """`loss: ipo` is `loss: {name: ipo}`, `beta: 0.1` is `loss: {beta: 0.1}`; null leaves it to the loss."""
            if not isinstance(values, Mapping) or not any(key in values for key in ("loss", *SHORT)):
                return values
            loss = values.get("loss", {})
            loss = {"name": loss} if isinstance(loss, str) else loss
            if not isinstance(loss, Mapping):
                return values
            short = {key: values[key] for key in SHORT if values.get(key) is not None}
            if twice := [key for key in short if key in loss]:
                raise ValueError(
                    f"{twice[0]} and loss.{twice[0]} are the same setting: keep one (null unsets the first)"
                )
            return {key: value for key, value in values.items() if key not in SHORT} | {"loss": {**loss, **short}}

    @dataclass
    class Inputs:
        policy: Policy
        comparisons: Comparisons | None = None
        rated: Rated | None = None
        heldout: Comparisons | None = None
        heldout_rated: Rated | None = None
        dev: Prompts | None = None
        reward: RewardModel | None = None
        heldout_reward: RewardModel | None = None
        judge: Judge | None = None

    @dataclass
    class Outputs:
        policy: Policy

    headline = ("loss", "accuracy", "margin", "tokens")

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        if "dev" not in given and (idle := sorted({"reward", "heldout_reward", "judge"} & given)):
            raise UserError(f"dpo: {' and '.join(idle)} score answers to `dev`, which is not given")
        if "dev" in given:
            require_room("dpo.max_new_tokens", config.max_new_tokens, config.max_tokens)
        scored = bool({"reward", "heldout_reward"} & given)
        require_budget("dpo", config.kl_budget, config.train, dev="dev" in given, scored=scored)
        loss = config.loss.made()
        if loss.paired and (rated := sorted(given & {"rated", "heldout_rated"})):
            raise UserError(
                f"dpo: the loss {loss.name} compares two answers to a prompt, which {' and '.join(rated)} do not have; "
                "use loss: {name: kto}, or give comparisons"
            )
        if not given & {"comparisons", "rated"}:
            wanted = "comparisons" if loss.paired else "rated answers, or comparisons to split"
            raise UserError(f"dpo: the loss {loss.name} needs {wanted}: give the row {wanted.split()[0]}")

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> AnyAdapter | None:
        return following(config.adapter, starts.get("policy"))

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.reader import Reader
        from pipeline.evaluate.watch import open_watch
        from pipeline.llama.adapters import told_share
        from pipeline.llama.open import open_trainable
        from pipeline.llama.save import save_policy
        from pipeline.rollout.engine import SamplingSettings
        from pipeline.train import strategy
        from pipeline.train.loop import fit
        from pipeline.train.preferences import imbalance, training_of
        from pipeline.train.reference import held_with_reference, require_start, with_reference, without_dropout

        config: Dpo.Config = self.config
        loss = config.loss.made()
        training = training_of(loss)
        reader = Reader(workspace)
        policy = open_trainable(inputs.policy, config.adapter, workspace.seed)
        share = told_share(policy.model, config.adapter, workspace)
        if loss.needs_reference and without_dropout(policy.module):
            workspace.say("dropout is off: the ratio to the reference would measure it")

        def encode(**slots: Comparisons | Rated | None) -> Any:
            given = {slot: artifact for slot, artifact in slots.items() if artifact}
            records = [
                record for slot, artifact in given.items() for record in reader.read(slot, artifact, artifact.kind)
            ]
            return training.encode(records, policy.chat, config.max_tokens).required(
                " and ".join(given), config.max_tokens
            )

        encoded = encode(comparisons=inputs.comparisons, rated=inputs.rated)
        if uneven := imbalance(loss, encoded.groups):
            workspace.say(uneven)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        make_plan = partial(
            training.plan, settings=config.train, seed=workspace.seed, strategy=ranks, weigh=training.weigh
        )
        plan = make_plan(encoded.groups)
        trainer = training.trainer(policy.module, config.train, ranks, total=len(plan), seed=workspace.seed)
        if loss.needs_reference:
            plan = make_plan(with_reference(trainer, plan, workspace, training.parts))
            require_start(trainer, plan.batch(0).groups, loss.start)
        evaluate = None
        if inputs.heldout or inputs.heldout_rated:
            held = encode(heldout=inputs.heldout, heldout_rated=inputs.heldout_rated).groups
            if loss.needs_reference:
                held = held_with_reference(trainer, held, workspace, training.parts)
            else:
                held = trainer.share(held)
            evaluate = lambda: trainer.evaluate(held, training.weigh(held))
        sampling = SamplingSettings(max_new_tokens=config.max_new_tokens)
        watch = open_watch(
            inputs, config, policy, reader, workspace, ranks.device, proxy=inputs.reward, sampling=sampling
        )
        outcome = fit(
            trainer,
            plan,
            workspace,
            evaluate=evaluate,
            watch=watch,
            figures=("loss", "accuracy", "margin"),
        )
        with trainer.whole():
            save_policy(policy, workspace)
        return {
            **(watch.chosen(outcome.kept_step, chose=outcome.chose, looked=len(outcome.looks)) if watch else {}),
            **{name: outcome.last[name] for name in FIGURES if name in outcome.last},
            "heldout_loss": outcome.kept.get("loss"),
            "heldout_accuracy": outcome.kept.get("accuracy"),
            "comparisons" if loss.paired else "rated": len(plan.groups),
            "dropped_too_long": encoded.dropped,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            **share,
            "read": reader.counts,
        }
