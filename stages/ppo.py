"""PPO with a KL penalty (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022), in five verbs.

    sample     answers to a batch of prompts, scored by the reward model
    target     old log-probs, values and reference log-probs become rewards, advantages, returns
    optimise   a few epochs over minibatches of whole prompt groups, policy and value together
    adjust     the KL coefficient
    log        what happened

The reference is the policy that the row starts from, the value model starts as the reward model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from pipeline.flow.artifacts import Policy, Prompts, RewardModel
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Stage, Workspace
from pipeline.llama.adapters import LoraSettings
from pipeline.rollout.engine import SamplingSettings
from pipeline.train.settings import TrainSettings


class KlSettings(Settings):
    """The penalty for moving away from the reference, taken off the reward token by token."""

    coefficient: float = Field(
        default=0.1, ge=0, description="Reward lost for each nat (beta); where `adaptive` starts."
    )
    control: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="Whether the coefficient follows `target`."
    )
    target: float = Field(default=6.0, gt=0, description="Nats a response that adaptive control aims for (Ziegler).")
    horizon: float = Field(default=10_000, gt=0, description="Responses over which adaptive control acts.")


class Ppo(Stage):
    name = "ppo"
    version = 1
    sources = ("data", "llama", "train", "algo", "rollout")
    same_tokenizer = (("policy", "reward"),)

    class Config(Settings):
        iterations: int = Field(default=16, ge=1, description="Rounds of sampling and optimising.")
        prompts: int = Field(default=64, ge=1, description="Prompts an iteration.")
        sampling: SamplingSettings = Field(
            default=SamplingSettings(samples=4, max_new_tokens=64), description="How answers are drawn."
        )
        epochs: int = Field(default=2, ge=1, description="Passes over an iteration's samples.")
        minibatch: int = Field(default=64, ge=1, description="Samples an update, in whole prompt groups.")
        gamma: float = Field(default=1.0, ge=0, le=1, description="Discount of later rewards.")
        lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda (Schulman et al. 2016).")
        clip: float = Field(default=0.2, gt=0, description="How far a probability ratio may move before it is clipped.")
        value_clip: float | None = Field(default=0.2, description="The same for values; null does not clip.")
        value_coefficient: float = Field(default=1.0, ge=0, description="Weight of the value loss.")
        value_rate: float = Field(default=1.0, gt=0, description="The value model's learning rate as a multiple.")
        entropy_coefficient: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
        unfinished_score: float | None = Field(
            default=-1.0, description="Score of an answer that does not stop; null leaves the reward model's."
        )
        kl: KlSettings = Field(default=KlSettings(), description="The KL penalty.")
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer prompts are dropped."
        )
        adapter: LoraSettings | None = Field(default=None, description="Train a LoRA adapter instead of all weights.")
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=1e-4, schedule="constant", warmup=0.0, betas=(0.9, 0.999)),
            description="Optimiser and token budget; how much is trained is set by iterations, epochs and minibatch.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        reward: RewardModel
        prompts: Prompts

    @dataclass
    class Outputs:
        policy: Policy

    headline = ("score", "kl", "explained_variance", "stop_rate", "tokens")

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        if config.sampling.truncated:
            raise UserError(
                "ppo.sampling: top_k, top_p, min_new_tokens and temperature 0 cut tokens from the distribution that "
                "answers are drawn from, so the policy's log-probs are not the sampler's; leave them at their defaults"
            )

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.algo.kl import controller
        from pipeline.data.reader import Reader
        from pipeline.llama.open import open_frozen, open_trainable, save_policy
        from pipeline.rollout.collect import Sampler, encode_prompts, finished_scores
        from pipeline.rollout.noise import NoiseKey
        from pipeline.rollout.reward import open_reward
        from pipeline.train import memory, strategy
        from pipeline.train.loop import Trainer
        from pipeline.train.ppo import Learner, Objective, PromptStream, groups_each, open_actor_critic, ppo_loss
        from pipeline.train.reference import without_dropout

        config: Ppo.Config = self.config
        reader = Reader(workspace)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        policy = open_trainable(inputs.policy, config.adapter, workspace.seed)
        reference = open_frozen(inputs.policy)
        reward = open_reward(inputs.reward)
        actor = open_actor_critic(policy, inputs.reward, config.adapter, workspace.seed)
        if without_dropout(actor):
            workspace.say("dropout is off: the ratio to the policy that sampled would measure it")
        found = reader.read("prompts", inputs.prompts, "prompts")
        prompts = encode_prompts(found, policy.chat, config.max_tokens, config.sampling.max_new_tokens)
        stream = PromptStream(len(prompts), config.prompts, workspace.seed)
        objective = Objective(
            gamma=config.gamma,
            lam=config.lam,
            clip=config.clip,
            value_clip=config.value_clip,
            value_coefficient=config.value_coefficient,
            entropy_coefficient=config.entropy_coefficient,
            temperature=config.sampling.temperature,
        )
        together = min(groups_each(config.minibatch, config.sampling.samples), stream.size)
        if together < ranks.world:
            raise UserError(
                f"ppo.minibatch: {config.minibatch} samples are {together} whole prompt groups, fewer than the "
                f"{ranks.world} processes that share them: raise minibatch (and prompts)"
            )
        updates = config.iterations * config.epochs * -(-stream.size // together)
        trainer = Trainer(
            actor,
            ppo_loss(objective),
            config.train,
            ranks,
            total=updates,
            seed=workspace.seed,
            rates={"value.": config.value_rate},
        )
        learner = Learner(trainer, reference.module, objective, epochs=config.epochs, minibatch=config.minibatch)
        sampler = Sampler(
            policy.model,
            policy.chat,
            config.sampling,
            NoiseKey(workspace.seed, workspace.stage),
            reward=reward,
            token_budget=config.train.token_budget,
        )
        frozen = [reference.module, reward.model]
        workspace.say(memory.statement([actor.policy, actor.value], frozen, policy.model, config.train))
        kl = controller({"kind": config.kl.control, **_controller_fields(config.kl)})
        tokens = 0
        for iteration in range(config.iterations):
            rollout = sampler.sample(prompts.take(stream.batch(iteration)), iteration=iteration, ranks=ranks)
            scores = finished_scores(rollout.samples, config.unfinished_score)
            targets = learner.targets(rollout.groups(scores), kl.coefficient, iteration)
            updated = learner.optimise(targets, iteration)
            figures = {**rollout.figures, **targets.figures, **updated, "kl_coefficient": kl.coefficient}
            kl = kl.update(targets.figures["kl"], len(rollout.samples))
            tokens += int(rollout.figures["sampled_tokens"] + updated["trained_tokens"])
            workspace.log(step=iteration + 1, **figures)
            shown = {k: figures[k] for k in ("score", "kl", "explained_variance")}
            workspace.progress(iteration + 1, config.iterations, "iterations", **shown)
        save_policy(policy, workspace)
        return {
            **figures,
            "samples": config.iterations * stream.size * config.sampling.samples,
            "dropped_prompts": prompts.dropped,
            "updates": trainer.done,
            "tokens": tokens,
            "read": reader.counts,
        }


def _controller_fields(kl: KlSettings) -> dict[str, float]:
    fixed = {"coefficient": kl.coefficient}
    return fixed if kl.control == "fixed" else {**fixed, "target": kl.target, "horizon": kl.horizon}
