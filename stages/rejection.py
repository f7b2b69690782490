"""Rejection sampling (best of N): sample, score once, keep the best, fine-tune the policy on the best.

Everything that was sampled is written out with its scores and log-probs, and comparisons of the best against the
worst answer of every prompt are what DPO starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipeline.flow.artifacts import Comparisons, Conversations, Policy, Prompts, RewardModel, Samples
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapters import LoraSettings
from pipeline.rollout.engine import SamplingSettings
from pipeline.train.settings import TrainSettings


class Rejection(Stage):
    name = "rejection"
    version = 1
    sources = ("data", "llama", "train", "algo", "rollout")
    same_tokenizer = (("policy", "reward"),)

    class Config(Settings):
        prompts: int | None = Field(default=None, ge=1, description="Prompts to sample for; null takes all of them.")
        sampling: SamplingSettings = Field(
            default=SamplingSettings(samples=8, max_new_tokens=64), description="How answers are drawn, N by `samples`."
        )
        margin: float = Field(
            default=0.0, ge=0, description="Least score difference (in standard deviations) of a pair written for DPO."
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer prompts are dropped."
        )
        adapter: LoraSettings | None = Field(default=None, description="Train a LoRA adapter instead of all weights.")
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=2e-4, batch=64, epochs=1),
            description="Optimiser, schedule and batches.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        reward: RewardModel
        prompts: Prompts

    @dataclass
    class Outputs:
        policy: Policy
        samples: Samples
        conversations: Conversations
        comparisons: Comparisons

    headline = ("score", "chosen", "pairs", "stop_rate")

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.groups import conversation_groups
        from pipeline.data.reader import Reader
        from pipeline.data.sources import write_jsonl
        from pipeline.llama.open import open_trainable, save_policy
        from pipeline.rollout.collect import Sampler, encode_prompts
        from pipeline.rollout.noise import NoiseKey
        from pipeline.rollout.reward import open_reward
        from pipeline.rollout.samples import best_conversations, best_worst_pairs, write_samples
        from pipeline.train import strategy
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import next_token
        from pipeline.train.ppo import PromptStream

        config: Rejection.Config = self.config
        reader = Reader(workspace)
        policy = open_trainable(inputs.policy, config.adapter, workspace.seed)
        reward = open_reward(inputs.reward)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        found = reader.read("prompts", inputs.prompts, "prompts")
        prompts = encode_prompts(found, policy.chat, config.max_tokens, config.sampling.max_new_tokens)
        prompts = prompts.take(PromptStream(len(prompts), config.prompts, workspace.seed).batch(0))
        sampler = Sampler(
            policy.model,
            policy.chat,
            config.sampling,
            NoiseKey(workspace.seed, workspace.stage),
            reward=reward,
            token_budget=config.train.token_budget,
        )
        answers = sampler.sample(prompts, ranks=ranks, progress=lambda d, n: workspace.progress(d, n, "samples"))
        chosen = best_conversations(answers.samples, "proxy")
        pairs = best_worst_pairs(answers.samples, "proxy", config.margin)
        write_samples(workspace.slot("samples") / "data.jsonl", answers.samples)
        write_jsonl(workspace.slot("conversations") / "data.jsonl", chosen.records)
        write_jsonl(workspace.slot("comparisons") / "data.jsonl", pairs.records)

        if not chosen.records:
            raise UserError(
                f"none of {len(answers.samples)} answers can be learnt from ({dict(chosen.skipped)}): unfinished ones "
                f"did not stop within {config.sampling.max_new_tokens} tokens; raise sampling.max_new_tokens, or train "
                "the policy for longer before this row"
            )
        if not pairs.records:
            workspace.say(
                f"no two answers to a prompt differ enough to compare ({dict(pairs.skipped)}): no comparisons"
            )
        encoded = conversation_groups(chosen.records, policy.chat, config.max_tokens, "marked")
        encoded.required("the chosen answers", config.max_tokens)
        plan = Plan(encoded.groups, config.train, seed=workspace.seed, strategy=ranks)
        trainer = Trainer(policy.module, next_token, config.train, ranks, total=len(plan), seed=workspace.seed)
        outcome = fit(trainer, plan, workspace, figures=("loss", "nll"))
        save_policy(policy, workspace)
        return {
            **answers.figures,
            "prompts": len(prompts),
            "chosen": len(chosen.records),
            "pairs": len(pairs.records),
            "skipped": {**chosen.skipped, **{f"pair_{k}": v for k, v in pairs.skipped.items()}},
            "loss": outcome.last.get("nll"),
            "steps": outcome.steps,
            "tokens": outcome.tokens + answers.figures["sampled_tokens"],
            "read": reader.counts,
        }
