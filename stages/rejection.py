"""Rejection sampling (best of N): draw, score, choose, mine pairs, learn the chosen answers.

    draw     N answers to each prompt, or none: a store of samples from another row serves as well
    score    every answer, by the reward model
    choose   the answers worth learning: the best of each prompt, a fraction of them, or all above a threshold
    mine     pairs of a better and a worse answer, which DPO starts from
    learn    the chosen answers; `train: null` leaves it at samples, conversations and comparisons

Rounds are rows: RAFT (Dong et al. 2023) is this row again from its own policy, Llama 2 (Touvron et al. 2023) a round
that reads the samples of earlier ones beside its own, Llama 3 (Grattafiori et al. 2024) reward, rejection, SFT and DPO
in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from pipeline.flow.artifacts import Comparisons, Conversations, Judge, Policy, Prompts, RewardModel, Samples
from pipeline.flow.config import Settings, not_identity
from pipeline.flow.errors import UserError
from pipeline.flow.stage import OneOrMore, Stage, Workspace
from pipeline.llama.adapter_settings import AnyAdapter, adapter_field, following
from pipeline.rollout.engine import EngineSettings, SamplingSettings, require_room
from pipeline.rollout.mining import ChooseSettings, PairSettings
from pipeline.rollout.reward_settings import RewardSettings
from pipeline.train.settings import TrainSettings, require_budget

if TYPE_CHECKING:
    from pipeline.data.reader import Reader
    from pipeline.data.records import Conversation, Sample
    from pipeline.llama.open import Trainable
    from pipeline.rollout.mining import Mined
    from pipeline.train.strategy import Strategy


class Rejection(Stage):
    name = "rejection"
    version = 2
    sources = (
        "data", "llama", "train", "algo", "rollout",
        "evaluate",
    )  # fmt: skip

    class Config(Settings):
        prompts: int | None = Field(default=None, ge=1, description="Prompts to sample for; null takes all of them.")
        round: int = Field(
            default=0,
            ge=0,
            description="Number of this draw, with noise of its own: rounds go on along the shuffled prompts, "
            "which are shuffled anew when too few for another round are left.",
        )
        sampling: SamplingSettings = Field(
            default=SamplingSettings(samples=8, max_new_tokens=64), description="How answers are drawn, N by `samples`."
        )
        engine: EngineSettings = Field(default=EngineSettings(), description="What draws them.")
        temperatures: tuple[float, ...] = Field(
            default=(), description="Draw N answers at each of these instead of at `sampling.temperature`."
        )
        score: str = Field(
            default="proxy", min_length=1, description="Name of the scores that answers are chosen by in the store."
        )
        reward: RewardSettings = Field(default=RewardSettings(), description="What answers are scored for.")
        choose: ChooseSettings = Field(default=ChooseSettings(), description="Which answers are learnt.")
        pairs: PairSettings = Field(default=PairSettings(), description="Which pairs are written for DPO.")
        max_tokens: int = Field(
            default=512, ge=8, description="Longest prompt with its answer; longer prompts are dropped."
        )
        token_budget: int = not_identity(8192, "Tokens a scoring pass at most.", ge=1)
        kl_budget: float | None = Field(
            default=None, gt=0, description="Nats a response beyond which no weights are kept as the best on `dev`."
        )
        adapter: AnyAdapter | None = adapter_field()
        train: TrainSettings | None = Field(
            default=TrainSettings(learning_rate=2e-4, batch=64, epochs=1),
            description="Optimiser, schedule and batches; null trains nothing, and the row has no policy to give on.",
        )

        @field_validator("temperatures")
        @classmethod
        def _rungs(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
            if len(set(temperatures)) < len(temperatures) or any(t < 0 for t in temperatures):
                raise ValueError(f"temperatures: each of them once and none below 0, not {list(temperatures)}")
            return temperatures

    @dataclass
    class Inputs:
        policy: Policy | None = None
        reward: OneOrMore[RewardModel] = field(default_factory=list)
        prompts: Prompts | None = None
        samples: list[Samples] = field(default_factory=list)
        dev: Prompts | None = None
        heldout_reward: RewardModel | None = None
        judge: Judge | None = None

    @dataclass
    class Outputs:
        policy: Policy | None
        samples: Samples
        conversations: Conversations
        comparisons: Comparisons

    headline = ("score", "chosen", "pairs", "stop_rate")

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        """What a row needs follows from what it does: draw, score, learn."""
        if not given & {"prompts", "samples"}:
            raise UserError("input prompts: nothing to draw answers for; wire prompts, or samples of another row")
        if config.train and "policy" not in given:
            raise UserError("input policy: nothing to train; wire a policy, or set train: null to write data alone")
        if "prompts" in given:
            if "policy" not in given:
                raise UserError("input policy: not given, but answers to prompts are drawn; wire it")
            if config.temperatures and config.sampling.num_beams > 1:
                raise UserError(
                    f"rejection.temperatures: beam search (sampling.num_beams {config.sampling.num_beams}) finds the "
                    "same answers at each of them: leave temperatures out, or num_beams at 1"
                )
            config.reward.require_source("rejection", "reward" in given)
            require_room("rejection.sampling.max_new_tokens", config.sampling.max_new_tokens, config.max_tokens)
        elif "reward" not in given and not config.reward.functions:
            config.reward.require_unset("rejection")
        scored = bool({"reward", "heldout_reward"} & given or config.reward.functions)
        at_one = config.sampling.model_copy(update={"temperature": 1.0})  # as `dev` is answered
        require_budget(
            "rejection", config.kl_budget, config.train, dev="dev" in given, scored=scored, cut=at_one.truncated
        )
        if "heldout_reward" in given and "dev" not in given:
            raise UserError("rejection: heldout_reward scores answers to `dev`, which is not given")

    @classmethod
    def check_names(cls, config: Any, names: Mapping[str, Sequence[str]]) -> None:
        config.reward.require_names("rejection", names.get("reward", ()))
        sources = [*names.get("reward", ()), *(f.source for f in config.reward.functions)]
        if len(sources) > 1 and config.score in sources:
            raise UserError(
                f"rejection.score: {config.score!r} is what one of {len(sources)} sources is called, whose own score "
                "it would replace in the store: choose another name for the score of all together"
            )

    @classmethod
    def withheld(cls, config: Any) -> frozenset[str]:
        return frozenset() if config.train else frozenset({"policy"})

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> AnyAdapter | None:
        return following(config.adapter, starts.get("policy")) if config.train else None

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.reader import Reader
        from pipeline.data.sources import write_jsonl
        from pipeline.evaluate.bestofn import curve
        from pipeline.evaluate.judges import GoldJudge
        from pipeline.rollout.mining import choose, mine
        from pipeline.rollout.samples import describe_samples, read_stores, summary, write_samples
        from pipeline.train import strategy

        config: Rejection.Config = self.config
        reader = Reader(workspace)
        training = config.train or TrainSettings()
        ranks = strategy.for_row(workspace, precision=training.precision, clip=training.clip)
        policy = self._open(inputs, workspace, ranks)
        drawn, dropped = self._draw(inputs, policy, reader, workspace, ranks)
        stored = read_stores(reader, inputs.samples)
        answers, scored_by = self._score([*stored, *drawn], inputs, workspace, ranks)
        chosen = choose(answers, config.score, config.choose)
        pairs = mine(answers, config.score, config.pairs, seed=workspace.seed)
        if ranks.main:
            write_samples(workspace.slot("samples") / "data.jsonl", answers)
            write_jsonl(workspace.slot("conversations") / "data.jsonl", chosen.records)
            write_jsonl(workspace.slot("comparisons") / "data.jsonl", pairs.records)
        describe_samples(workspace, "samples", (s.origin for s in answers), scored_by)
        if not pairs.records:
            workspace.say(f"no two answers to a prompt differ enough to compare ({pairs.passed_over}): no comparisons")
        learnt = {}
        if policy and config.train:
            learnt = self._learn(policy, answers, chosen, inputs, reader, workspace, ranks)
        judge = GoldJudge.open(inputs.judge.data_files[0]) if inputs.judge else None
        return {
            **summary(answers, drawn, config.score),
            "dropped_prompts": dropped,
            "chosen": len(chosen.records),
            "pairs": len(pairs.records),
            "skipped": {**chosen.skipped, **{f"pair_{k}": v for k, v in pairs.skipped.items()}},
            "best_of_n": {"policy": _name(inputs), "rows": curve(answers, config.score, judge, seed=workspace.seed)},
            **learnt,
            "tokens": learnt.get("trained_tokens", 0) + sum(len(s.ids) for s in drawn),
            "read": reader.counts,
        }

    def _open(self, inputs: Inputs, workspace: Workspace, ranks: Strategy) -> Trainable | None:
        """To be trained, or only asked; None where nothing is drawn and nothing learnt."""
        from pipeline.llama.open import open_frozen, open_trainable

        if inputs.policy is None or not (self.config.train or inputs.prompts):
            return None
        if self.config.train:
            policy = open_trainable(inputs.policy, self.config.adapter, workspace.seed)
        else:
            policy = open_frozen(inputs.policy)
        policy.module.to(ranks.device)
        return policy

    def _draw(
        self, inputs: Inputs, policy: Trainable | None, reader: Reader, workspace: Workspace, ranks: Strategy
    ) -> tuple[list[Sample], int]:
        """Fresh answers, and how many prompts were too long to ask; none where no prompts are wired."""
        from pipeline.rollout.collect import encode_prompts
        from pipeline.rollout.draw import draw
        from pipeline.rollout.portions import Portions
        from pipeline.rollout.samples import origin_of
        from pipeline.train.ppo import PromptStream

        config: Rejection.Config = self.config
        if not (inputs.prompts and inputs.policy and policy):
            return [], 0
        found = reader.read("prompts", inputs.prompts, "prompts")
        prompts = encode_prompts(found, policy.chat, config.max_tokens, config.sampling.max_new_tokens)
        stream = PromptStream(len(prompts), config.prompts, workspace.seed)
        if few := stream.shortage():
            workspace.say(few)
        prompts = prompts.take(stream.batch(config.round))
        origin = origin_of(inputs.policy, workspace.stage, workspace.seed, iteration=config.round)
        drawn = draw(
            policy.model,
            policy.chat,
            prompts,
            config.sampling,
            origin,
            temperatures=config.temperatures,
            ranks=ranks,
            progress=lambda d, n: workspace.progress(d, n, "samples"),
            engine=config.engine,
            kept=Portions(workspace.working("drawn"), ranks, workspace.say),
        )
        return drawn, prompts.dropped

    def _score(
        self, answers: list[Sample], inputs: Inputs, workspace: Workspace, ranks: Strategy
    ) -> tuple[list[Sample], dict[str, str]]:
        """Every answer scored by all sources, or as it is in the store; and by source the reward model that scored."""
        from pipeline.rollout.reward_settings import PROXY
        from pipeline.rollout.rewards import Rewards
        from pipeline.rollout.samples import note_rendering, score_again, shared_scores, with_scores

        config: Rejection.Config = self.config
        scored_by = {name: d for a in inputs.samples for name, d in a.lineage.get("scored_by", {}).items()}
        if not (inputs.reward or config.reward.functions):
            return answers, scored_by
        rewards = Rewards.open(inputs.reward, config.reward, {}, config.token_budget)
        called = {name: name if len(rewards.names) > 1 else config.score for name in rewards.names}
        for artifact, model in zip(inputs.reward, rewards.models, strict=True):
            source, budget = called[model.name], config.token_budget
            model.reward.model.to(ranks.device)
            note_rendering(workspace, "samples", answers, artifact.lineage, f"the reward model {model.name}")
            answers = score_again(answers, source, model.reward, artifact.lineage, token_budget=budget, ranks=ranks)
            scored_by |= {source: artifact.digest}
        for function in rewards.functions:
            answers = with_scores(answers, called[function.name], shared_scores(answers, function.scores, ranks))
        found = {name: [s.scores[own] for s in answers] for name, own in called.items()}
        together = with_scores(answers, PROXY, rewards.together(found, len(answers)))
        return with_scores(answers, config.score, rewards.total(together, ranks)), scored_by

    def _learn(
        self,
        policy: Trainable,
        answers: list[Sample],
        chosen: Mined[Conversation],
        inputs: Inputs,
        reader: Reader,
        workspace: Workspace,
        ranks: Strategy,
    ) -> dict[str, Any]:
        """Fine-tune the policy on the chosen answers as texts."""
        from pipeline.data.groups import conversation_groups
        from pipeline.evaluate.watch import open_watch
        from pipeline.llama.adapters import told_share
        from pipeline.llama.save import save_policy
        from pipeline.rollout.rewards import Rewards
        from pipeline.rollout.samples import note_rendering
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import next_token

        config: Rejection.Config = self.config
        assert config.train and inputs.policy
        if not chosen.records:
            raise UserError(
                f"none of {len(answers)} answers can be learnt from ({chosen.passed_over}): unfinished ones did not "
                f"stop within {config.sampling.max_new_tokens} tokens; raise sampling.max_new_tokens, lower "
                "choose.threshold where it is set, or train the policy for longer before this row"
            )
        share = told_share(policy.model, config.adapter, workspace)
        note_rendering(workspace, "conversations", answers, inputs.policy.lineage, "the policy")
        encoded = conversation_groups(chosen.records, policy.chat, config.max_tokens, "marked")
        encoded.required("the chosen answers", config.max_tokens)
        plan = Plan(encoded.groups, config.train, seed=workspace.seed, strategy=ranks)
        trainer = Trainer(policy.module, next_token, config.train, ranks, total=len(plan), seed=workspace.seed)
        scored = inputs.dev and (inputs.reward or config.reward.functions)
        proxy = (
            Rewards.open(inputs.reward, config.reward, inputs.policy.lineage, config.token_budget) if scored else None
        )
        watch = open_watch(
            inputs, config, policy, reader, workspace, ranks.device, proxy=proxy, sampling=config.sampling
        )
        outcome = fit(
            trainer,
            plan,
            workspace,
            watch=watch,
            figures=("loss", "nll"),
        )
        with trainer.whole():
            save_policy(policy, workspace)
        watched = watch.chosen(outcome.kept_step, chose=outcome.chose, looked=len(outcome.looks)) if watch else {}
        figures = {"loss": outcome.last.get("nll"), "steps": outcome.steps, "trained_tokens": outcome.tokens}
        return watched | figures | share


def _name(inputs: Rejection.Inputs) -> str | None:
    """The policy that was drawn from, by its row; None where the answers come from stores."""
    return inputs.policy.meta.get("row") if inputs.policy and not inputs.samples else None
