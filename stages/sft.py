"""Supervised fine-tuning on dialogues, loss on the assistant's rounds alone.

`train_on` chooses between both ways that the literature knows: every round (default) or the last one.

    sft: {template: llama-3, add_tokens: ["<think>", "</think>"]}      what later rows inherit with the policy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.data.templates import TemplateName
from pipeline.flow.artifacts import Conversations, Policy
from pipeline.flow.config import Settings, added
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapter_settings import AnyAdapter, adapter_field, following
from pipeline.train.settings import TrainSettings


class Sft(Stage):
    name = "sft"
    version = 1
    sources = ("data", "llama", "train", "algo")

    class Config(Settings):
        train_on: Literal["all_rounds", "last_round", "marked"] = Field(
            default="all_rounds", description="Which assistant turns carry loss."
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest dialogue; longer ones lose their oldest rounds."
        )
        template: TemplateName | None = added(
            None, "Chat format, by name, that the policy learns and keeps; that of its tokenizer by default."
        )
        add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = added(
            (),
            "Words that are one token each from here on; old rows of the embedding and the head keep their bits, new "
            "ones are the mean of the old (Hewitt 2021) plus noise of a tenth of their spread.",
        )
        adapter: AnyAdapter | None = adapter_field()
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=1e-3, batch=32, epochs=2),
            description="Optimiser, schedule and batches.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        conversations: Conversations
        heldout: Conversations | None = None

    @dataclass
    class Outputs:
        policy: Policy

    headline = ("loss", "accuracy", "tokens")

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> AnyAdapter | None:
        return following(config.adapter, starts.get("policy"))

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.groups import conversation_groups
        from pipeline.data.reader import Reader
        from pipeline.llama.adapters import told_share
        from pipeline.llama.make import extended
        from pipeline.llama.open import open_trainable
        from pipeline.llama.save import save_policy
        from pipeline.train import strategy
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import per_round

        config: Sft.Config = self.config
        reader = Reader(workspace)
        policy = open_trainable(inputs.policy, config.adapter, workspace.seed)
        policy = extended(policy, config.template, config.add_tokens, workspace.seed)
        share = told_share(policy.model, config.adapter, workspace)
        conversations = reader.read("conversations", inputs.conversations, "conversations")
        encode = lambda records, slot: conversation_groups(
            records, policy.chat, config.max_tokens, config.train_on
        ).required(slot, config.max_tokens)
        encoded = encode(conversations, "conversations")
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        plan = Plan(encoded.groups, config.train, seed=workspace.seed, strategy=ranks)
        trainer = Trainer(policy.module, per_round, config.train, ranks, total=len(plan), seed=workspace.seed)
        evaluate = None
        if inputs.heldout:
            held = trainer.share(encode(reader.read("heldout", inputs.heldout, "conversations"), "heldout").groups)
            evaluate = lambda: trainer.evaluate(held)
        outcome = fit(trainer, plan, workspace, evaluate=evaluate, best_by="nll", figures=("loss", "accuracy"))
        with trainer.whole():
            save_policy(policy, workspace)
        return {
            "loss": outcome.last.get("nll"),
            "accuracy": outcome.last.get("accuracy"),
            "heldout_loss": outcome.kept.get("nll"),
            "kept_step": outcome.kept_step,
            "conversations": len(encoded.groups),
            "dropped_too_long": encoded.dropped,
            "shortened": encoded.shortened,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            **share,
            "read": reader.counts,
        }
