"""PPO with a KL penalty (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022), in five verbs.

    sample     answers to a batch of prompts, scored by reward models and functions
    target     old log-probs, values and reference log-probs become rewards, advantages, returns
    optimise   a few epochs over minibatches of whole prompt groups, policy and value together
    adjust     the KL coefficient
    log        what happened

The reference is the policy that the row starts from, the value model starts as the reward model; settings choose
others (RLOO, GRPO and REINFORCE++ need no value model). A row that was stopped goes on after its last iteration, bit
for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from pipeline.flow.artifacts import Conversations, Documents, Judge, Policy, Prompts, RewardModel, Samples
from pipeline.flow.errors import UserError
from pipeline.flow.stage import OneOrMore, Stage, Workspace
from pipeline.llama.adapter_settings import AnyAdapter, adapter_field, following
from pipeline.rollout.engine import EngineSettings, SamplingSettings, require_room
from pipeline.rollout.reward_settings import RewardSettings
from pipeline.train.ppo_settings import LARGEST_ERROR, NEED_GROUPS, PpoSettings
from pipeline.train.settings import TrainSettings, require_budget


class Ppo(Stage):
    name = "ppo"
    version = 2
    sources = ("data", "llama", "train", "algo", "rollout", "evaluate")

    class Config(PpoSettings):
        iterations: int = Field(default=16, ge=1, description="Rounds of sampling and optimising.")
        prompts: int = Field(default=64, ge=1, description="Prompts an iteration.")
        sampling: SamplingSettings = Field(
            default=SamplingSettings(samples=4, max_new_tokens=64), description="How answers are drawn."
        )
        engine: EngineSettings = Field(default=EngineSettings(), description="What draws them.")
        reward: RewardSettings = Field(
            default=RewardSettings(unfinished_score=-1.0), description="What answers are rewarded for."
        )
        kl_budget: float | None = Field(
            default=None, gt=0, description="Nats a response beyond which no weights are kept as the best on `dev`."
        )
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer prompts are dropped."
        )
        adapter: AnyAdapter | None = adapter_field()
        train: TrainSettings = Field(
            default=TrainSettings(
                learning_rate=1e-4, schedule="constant", warmup=0.0, betas=(0.9, 0.999), checkpoint_every=1
            ),
            description="Optimiser and token budget; how much is trained is set by iterations, epochs and minibatch.",
        )

    @dataclass
    class Inputs:
        policy: Policy
        prompts: Prompts
        reward: OneOrMore[RewardModel] = field(default_factory=list)
        dev: Prompts | None = None
        heldout_reward: RewardModel | None = None
        judge: Judge | None = None
        documents: Documents | None = None
        conversations: Conversations | None = None

    @dataclass
    class Outputs:
        policy: Policy
        samples: Samples
        average: Policy | None = None

    headline = ("score", "kl", "explained_variance", "stop_rate", "tokens")

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        config.reward.require_source("ppo", "reward" in given)
        require_room("ppo.sampling.max_new_tokens", config.sampling.max_new_tokens, config.max_tokens)
        if config.sampling.temperature == 0.0:
            raise UserError("ppo.sampling.temperature: 0 draws one answer only, so there is nothing to learn from")
        for name in ("skip_spikes", "batch_start"):
            if getattr(config.train, name) is not None:
                raise UserError(f"ppo.train.{name}: has no effect in PPO, whose steps are set by prompts and minibatch")
        if config.sampling.truncated and not config.importance.correct:
            raise UserError(
                "ppo.sampling: top_k, top_p, min_new_tokens and the like cut tokens from the distribution that answers "
                "are drawn from, so the policy's log-probs are not the sampler's; leave them at their defaults, or set "
                "ppo.importance.correct"
            )
        if config.advantage in NEED_GROUPS and config.sampling.samples < 2:
            raise UserError(
                f"ppo.advantage: {config.advantage} compares answers to one prompt; set ppo.sampling.samples to 2 or "
                "more"
            )
        for slot, weight, name in (
            ("documents", config.mix.pretraining, "pretraining"),
            ("conversations", config.mix.sft, "sft"),
        ):
            if weight and slot not in given:
                raise UserError(f"ppo.mix.{name} is {weight:g}, but the row has no input {slot!r} to take records from")
        each, horizon = config.prompts * config.sampling.samples, config.kl.horizon
        if config.kl.control == "adaptive" and horizon <= LARGEST_ERROR * each:
            raise UserError(
                f"ppo.kl.horizon: {horizon:g} is too short for {each} responses an iteration (prompts times samples): "
                f"one step could take the coefficient to 0 or below; set it above {LARGEST_ERROR * each:g}"
            )
        if config.has_critic and config.critic.start == "reward" and "reward" not in given:
            raise UserError(
                "ppo.critic.start: the critic starts as the reward model, and there is none; set it to policy or shared"
            )
        if "dev" not in given and {"heldout_reward", "judge"} & given:
            raise UserError("ppo: heldout_reward and judge score answers to `dev`, which is not given")
        require_budget(
            "ppo", config.kl_budget, config.train, dev="dev" in given, scored=True, cut=config.sampling.truncated
        )

    @classmethod
    def check_names(cls, config: Any, names: Mapping[str, Sequence[str]]) -> None:
        config.reward.require_names("ppo", names.get("reward", ()))

    @classmethod
    def boundaries(cls, config: Any) -> tuple[tuple[str, ...], ...]:
        """A critic that starts as the reward model reads the policy's ids; reward models themselves may read texts."""
        return (("policy", "reward[0]"),) if config.has_critic and config.critic.start == "reward" else ()

    @classmethod
    def withheld(cls, config: Any) -> frozenset[str]:
        return frozenset() if config.average else frozenset({"average"})

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> AnyAdapter | None:
        return following(config.adapter, starts.get("policy"))

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.algo.kl import controller
        from pipeline.data.reader import Reader
        from pipeline.evaluate.watch import open_watch
        from pipeline.llama.adapters import share_frozen, told_share
        from pipeline.llama.quantise_settings import rounds
        from pipeline.llama.save import save_policy
        from pipeline.rollout.collect import Sampler, encode_prompts
        from pipeline.rollout.noise import NoiseKey
        from pipeline.rollout.rewards import Rewards
        from pipeline.rollout.samples import SampleLog, describe_samples, origin_of, recorded
        from pipeline.train import memory, ppo_checks, strategy
        from pipeline.train.loop import Trainer
        from pipeline.train.parked import bring
        from pipeline.train.ppo import Learner, PromptStream, groups_each
        from pipeline.train.ppo_loss import Phase, ppo_loss
        from pipeline.train.ppo_state import Progress
        from pipeline.train.roles import open_roles

        config: Ppo.Config = self.config
        reader = Reader(workspace)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        if ranks.sharded and (config.reference.kind != "start" or config.average):
            raise UserError("ppo: weights sharded by ZeRO-3 cannot be followed: reference.kind start and no average")
        first = inputs.reward[0] if inputs.reward else None
        roles = open_roles(inputs.policy, first, config, config.adapter, workspace.seed)
        share = told_share(roles.policy.model, config.adapter, workspace)
        rewards = Rewards.open(inputs.reward, config.reward, inputs.policy.lineage, config.train.token_budget)
        watch = open_watch(
            inputs, config, roles.policy, reader, workspace, "cpu", proxy=rewards, sampling=config.sampling
        )
        for caution in config.cautions():
            workspace.say(caution)
        if config.has_critic and config.critic.warmup >= config.iterations:
            workspace.say(
                f"critic.warmup: all {config.iterations} iterations train the critic alone, the policy stays what it "
                "was"
            )
        if roles.dropout_off:
            workspace.say("dropout is off: the ratio to the policy that sampled would measure it")
        policy, temperature = roles.policy, config.sampling.temperature
        found = reader.read("prompts", inputs.prompts, "prompts")
        prompts = encode_prompts(found, policy.chat, config.max_tokens, config.sampling.max_new_tokens)
        longest = max(map(len, prompts.ids)) + config.sampling.samples * config.sampling.max_new_tokens
        if longest > config.train.token_budget:
            raise UserError(
                f"ppo.train.token_budget: {config.train.token_budget} tokens a pass, but a prompt with its "
                f"{config.sampling.samples} answers may have {longest}: raise it, or lower sampling.samples or "
                "sampling.max_new_tokens"
            )
        stream = PromptStream(len(prompts), config.prompts, workspace.seed)
        if few := stream.shortage():
            workspace.say(few)
        together = min(groups_each(config.minibatch, config.sampling.samples), stream.size)
        if together < ranks.world:
            raise UserError(
                f"ppo.minibatch: {config.minibatch} samples are {together} whole prompt groups, fewer than the "
                f"{ranks.world} processes that share them: raise minibatch (and prompts)"
            )
        seen = watch.networks if watch else []
        still = [*roles.still, *rewards.networks, *seen]
        moving = [model for model in roles.frozen if model not in still]
        trained: list[Any] = [m for m in (roles.actor.policy, roles.actor.value) if m is not None]
        shared = share_frozen(*([] if ranks.sharded else trained), *still)
        told = memory.statement(
            trained, [*moving, *still], config, ranks, workspace.launch, prompts.ids, shared=shared, looks=bool(watch)
        )
        workspace.say(told)
        head = [roles.reference.module.head] if config.kl.where == "loss" and config.kl.estimator == "exact" else []
        parked = bring(ranks, workspace.frozen, roles.actor, still, moving, staying=head)
        if parked.bytes:
            workspace.say(f"{memory.human(parked.bytes)} of frozen models are elsewhere during updates (launch.frozen)")
        phase = Phase()
        trainer = Trainer(
            roles.actor,
            ppo_loss(config, temperature, phase),
            config.train,
            ranks,
            total=config.iterations * config.epochs * -(-stream.size // together),
            seed=workspace.seed,
            coefficients={"pretraining": config.mix.pretraining, "sft": config.mix.sft},
            rates=_rates(config),
            parts=("policy.", "value.") if config.has_critic else (),
        )
        learner = Learner(
            trainer,
            roles.reference.module,
            config,
            phase,
            temperature=temperature,
            mix=_mix(config, inputs, reader, policy.chat, workspace.seed),
            after_update=roles.after_update,
        )
        sampler = Sampler(
            policy.model,
            policy.chat,
            config.sampling,
            NoiseKey(workspace.seed, workspace.stage),
            reward=rewards,
            token_budget=config.train.token_budget,
            engine=config.engine,
        )
        progress = Progress(workspace, trainer, roles, config, watch, controller(config.kl.controller()), rewards)
        start = progress.resume()
        origin = origin_of(inputs.policy, workspace.stage, workspace.seed, temperature=temperature)
        log = SampleLog(workspace.working("samples.jsonl"), start=start, main=ranks.main)
        with progress.saving.stoppable():
            for iteration in range(start, config.iterations):
                with trainer.whole(), parked.whole(*rewards.networks):
                    rollout = sampler.sample(prompts.take(stream.batch(iteration)), iteration=iteration, ranks=ranks)
                drawn = replace(origin, policy=origin.policy if iteration == 0 else None, iteration=iteration)
                log.append(recorded(rollout.samples, rollout.prompt_ids, drawn))
                scores = rewards.total(rollout.samples, ranks)
                with parked.whole(roles.reference.module):
                    targets = learner.targets(rollout.groups(scores), progress.kl.coefficient, iteration)
                if not config.importance.correct:
                    coarse = config.engine.precision != "model" or config.engine.engine != "native"
                    coarse |= rounds(policy.model)
                    precision = "bf16" if coarse else trainer.precision
                    ppo_checks.require_sampler(targets.largest_gap, targets.figures["sampler_gap"], precision)
                updated = learner.optimise(targets, progress.kl.coefficient, iteration)
                roles.after_iteration(iteration + 1)
                figures = {**rollout.figures, **targets.figures, **updated, "kl_coefficient": progress.kl.coefficient}
                with parked.whole(*(seen if progress.looks_after(iteration) else [])):
                    progress.finish(iteration, figures, samples=len(rollout.samples))
        chosen = progress.settle()
        with trainer.whole():
            save_policy(policy, workspace)
        if ranks.main:
            shutil.copyfile(log.path, workspace.slot("samples") / "data.jsonl")
        describe_samples(workspace, "samples", [origin], rewards.digests)
        if roles.average:
            save_policy(roles.average, workspace, "average")
        return {
            **progress.figures,
            **chosen,
            "samples": config.iterations * stream.size * config.sampling.samples,
            "dropped_prompts": prompts.dropped,
            "updates": trainer.done,
            "tokens": progress.tokens,
            **share,
            "read": reader.counts,
        }


def _rates(config: Ppo.Config) -> dict[str, float]:
    """Learning rates as multiples of the policy's, by role."""
    if not config.has_critic:
        return {"policy.": 1.0}
    own = config.critic.learning_rate
    return {"policy.": 1.0, "value.": own / config.train.learning_rate if own is not None else 1.0}


def _mix(config: Ppo.Config, inputs: Any, reader: Any, chat: Any, seed: int) -> list[Any]:
    """Streams of the other records that updates hold."""
    from pipeline.data.groups import conversation_groups, document_groups
    from pipeline.train.ppo import RecordStream

    streams = []
    if config.mix.pretraining:
        documents = reader.read("documents", inputs.documents, "documents")
        groups = document_groups(documents, chat, config.max_tokens).required("documents", config.max_tokens).groups
        streams.append(RecordStream(groups, "pretraining", config.mix.batch, seed))
    if config.mix.sft:
        conversations = reader.read("conversations", inputs.conversations, "conversations")
        encoded = conversation_groups(conversations, chat, config.max_tokens, "all_rounds")
        groups = encoded.required("conversations", config.max_tokens).groups
        streams.append(RecordStream(groups, "sft", config.mix.batch, seed))
    return streams
