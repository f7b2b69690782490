"""What PPO does between two rollouts: targets from the policy that sampled, then updates on them.

A minibatch is a list of forests of whole prompt groups. They are built once an iteration; old log-probs and values
are computed on the very forests that the first epoch trains on, so that its first ratio is exactly 1.

Legend: T tokens of a forest, N answers in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.algo.advantages import (
    gae_ragged,
    group_relative,
    leave_one_out,
    moments,
    returns_to_go_ragged,
    shaped_rewards_ragged,
    spread,
    whiten,
)
from pipeline.algo.kl import ESTIMATORS, k1
from pipeline.algo.policy import explained_variance, explained_variance_sums, importance_weights
from pipeline.data.forest import Forest, Group
from pipeline.data.groups import answers, sum_by_segment
from pipeline.llama.arithmetic import fast_products
from pipeline.llama.heads import Compared
from pipeline.train import ppo_checks
from pipeline.train.loop import Trainer, evaluating
from pipeline.train.metrics import Sums, merge
from pipeline.train.ppo_loss import TERM, Phase, mark_mixed, token_weights, wanted
from pipeline.train.ppo_settings import PpoSettings
from pipeline.train.randomness import permutation

Gather = Callable[[Any], list[Any]]  # the JSON values of all ranks


@dataclass(frozen=True)
class Targets:
    """Minibatches whose forests carry what the loss reads, and what was measured."""

    minibatches: list[list[Forest]]
    figures: dict[str, float]
    largest_kl: float  # largest |log ratio to the reference| of a token, exactly 0 in the first iteration
    largest_gap: float  # largest |trainer's log-prob less the sampler's| of a token


@torch.no_grad()
def make_targets(
    actor: Callable[..., Any],
    reference: Callable[..., Any],
    minibatches: list[list[Forest]],
    beta: float,
    settings: PpoSettings,
    *,
    temperature: float = 1.0,
    reference_head: Any = None,
    gather: Gather = lambda x: [x],
    passes: Sequence[int] | None = None,
) -> Targets:
    """Old log-probs, values and reference log-probs to shaped rewards and advantages (whitened over all ranks).

    Each forest has the fact `score` on its answers and the token value `sampler_logprobs` (Ouyang et al. 2022, section
    3.5: reward = score - beta * KL). With the KL in the loss the reward is the score alone. `passes` says by minibatch
    how many times every rank calls the actor, which gathers weights that are cut up: a rank with fewer forests calls it
    on one of its own again.
    """
    measured = _Measured()
    in_reward = beta if settings.kl.where == "reward" else 0.0
    exact = settings.kl.estimator == "exact"
    needed = tuple(part for part in wanted(settings) if part != "entropy")
    done: list[list[Forest]] = []
    for number, forests in enumerate(minibatches):
        done.append([])
        for forest in forests:
            mask = forest.weights_T > 0
            base = reference(forest, temperature=temperature, states=exact)
            compared = Compared(base.states_TD, reference_head) if exact else None
            old = actor(forest, want=needed, temperature=temperature, compared=compared)
            kl = old.kl_T if exact else ESTIMATORS[settings.kl.estimator](old.logprobs_T, base.logprobs_T, mask)
            at = answers(forest)
            scores = forest.facts["score"][at]
            ppo_checks.require_finite("scores", scores, "look at the reward's sources and their settings")
            rewards = shaped_rewards_ragged(kl, scores, forest.start_S[at], forest.length_S[at], in_reward)
            ppo_checks.require_scores_last(rewards, kl, scores, forest, at, in_reward)
            weight_T, _ = token_weights(forest, at, settings.average_over)
            more = {"old_logprobs": old.logprobs_T, "weight": weight_T, "reference_logprobs": base.logprobs_T}
            if exact and settings.kl.where == "loss":
                more["reference_states"] = base.states_TD
            more |= _advantages(settings, rewards, old.values_T, forest, at, mask)
            importance, gap = importance_weights(
                old.logprobs_T, forest.tokens["sampler_logprobs"], mask, settings.importance.cap
            )
            if settings.importance.correct:
                more["importance"] = importance
            measured.add(forest, at, more, k1(old.logprobs_T, base.logprobs_T, mask), gap)
            done[-1].append(forest.with_tokens(**more))
        for _ in range(passes[number] - len(forests) if passes else 0):
            actor(next(f for own in minibatches for f in own), want=needed, temperature=temperature)
    figures, totals = measured.figures(gather)
    if settings.whitens:
        done = [
            [f.with_tokens(advantages=whiten(f.tokens["advantages"], f.weights_T > 0, totals=totals)) for f in forests]
            for forests in done
        ]
    return Targets(done, figures, measured.largest_kl, measured.largest_gap)


def _advantages(
    settings: PpoSettings, rewards: Tensor, values: Tensor | None, forest: Forest, at: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    start, length, size = forest.start_S[at], forest.length_S[at], len(forest)
    if settings.advantage == "gae":
        assert values is not None
        ppo_checks.require_finite("values", values[mask], "the critic has diverged: lower critic.learning_rate")
        gae = lambda lam: gae_ragged(rewards, values, start, length, gamma=settings.gamma, lam=lam, mask_T=mask)
        advantages, returns = gae(settings.lam)
        if settings.value_lam is not None:
            returns = gae(settings.value_lam)[1]
        return {"advantages": advantages, "returns": returns, "old_values": values}
    if settings.advantage == "reinforce++":
        return {"advantages": returns_to_go_ragged(rewards, start, length, gamma=settings.gamma, mask_T=mask)}
    whole_N = sum_by_segment(rewards, forest)[at]
    group_N = forest.group_S[at]
    if settings.advantage == "rloo":
        relative = leave_one_out(whole_N, group_N)
    else:
        relative = group_relative(whole_N, group_N, divide=settings.divide)
    return {"advantages": spread(relative, start, length, size)}


class _Measured:
    """Figures of an iteration as sums, so that they do not depend on how it was cut up."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.spread = torch.zeros(3, dtype=torch.float64)
        self.explained = torch.zeros(5, dtype=torch.float64)
        self.largest_kl = self.largest_gap = 0.0

    def add(self, forest: Forest, at: Tensor, values: Mapping[str, Tensor], kl: Tensor, gap: Mapping[str, Any]) -> None:
        mask = forest.weights_T > 0
        self.spread += moments(values["advantages"], mask).cpu()
        if "old_values" in values:
            self.explained += explained_variance_sums(values["old_values"], values["returns"], mask).cpu()
        self.largest_kl = _larger(self.largest_kl, kl.abs())
        apart = (values["old_logprobs"] - forest.tokens["sampler_logprobs"]).abs() * mask
        self.largest_gap = _larger(self.largest_gap, apart)
        self.sums.add({"kl": (kl.double().sum(), at.numel()), **gap})

    def figures(self, gather: Gather) -> tuple[dict[str, float], Tensor]:
        """The figures over all ranks, and the moments of the advantages."""
        everyone = gather(
            {"sums": self.sums.totals(), "spread": self.spread.tolist(), "explained": self.explained.tolist()}
        )
        add = lambda name: torch.tensor([rank[name] for rank in everyone], dtype=torch.float64).sum(0)
        found = {name: total / count for name, (total, count) in merge(r["sums"] for r in everyone).items() if count}
        explained = add("explained")
        if explained[0]:
            variance = explained_variance(explained)
            found["explained_variance"] = math.nan if variance is None else variance
            found["return"] = float(explained[1] / explained[0])
        return found, add("spread")


def _larger(known: float, values: Tensor) -> float:
    """The maximum; NaN stays NaN, which Python's max would lose."""
    return float(torch.maximum(values.max(), torch.tensor(known, device=values.device)))


class PromptStream:
    """Batches of prompt numbers, shuffled epoch after epoch; what an iteration sees follows from its number alone."""

    def __init__(self, prompts: int, size: int | None, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.size = min(size or prompts, prompts)
        self.wanted = size or prompts

    def shortage(self) -> str | None:
        """What to say where there are fewer prompts than a batch is set to have."""
        few = f"prompts is {self.wanted}, but there are only {self.prompts} to ask: all of them are asked each time"
        return few if self.prompts < self.wanted else None

    def batch(self, iteration: int) -> list[int]:
        """Without repeats inside a batch: what is left of an epoch and too small for one is not used."""
        epoch, place = divmod(iteration, self.prompts // self.size)
        order = permutation(self.prompts, self.seed, "prompts", epoch)
        return order[place * self.size : (place + 1) * self.size]


class RecordStream:
    """Other records for every update, shuffled epoch after epoch; what an update sees follows from its number."""

    def __init__(self, groups: Sequence[Group], term: str, size: int, seed: int) -> None:
        self.groups, self.term, self.seed = mark_mixed(groups, term), term, seed
        self.size = min(size, len(groups))

    def batch(self, update: int) -> list[Group]:
        first, count = update * self.size, len(self.groups)
        epochs = {number // count for number in range(first, first + self.size)}
        order = {epoch: permutation(count, self.seed, self.term, epoch) for epoch in epochs}
        return [self.groups[order[n // count][n % count]] for n in range(first, first + self.size)]


def groups_each(minibatch: int, samples: int) -> int:
    """Prompt groups in a minibatch of that many samples: whole ones, at least one."""
    return max(1, minibatch // max(1, samples))


class Learner:
    """Actor and critic with their reference: targets from a rollout, then a few epochs of updates on them."""

    def __init__(
        self,
        trainer: Trainer,
        reference: nn.Module,
        settings: PpoSettings,
        phase: Phase,
        *,
        temperature: float = 1.0,
        mix: Sequence[RecordStream] = (),
        after_update: Callable[[], None] = lambda: None,
    ) -> None:
        """`phase` is the one that the trainer's loss reads; `after_update` runs after every update."""
        self.trainer, self.reference, self.settings, self.phase = trainer, reference, settings, phase
        self.temperature, self.mix, self.after_update = temperature, mix, after_update
        phase.reference_head = getattr(reference, "head", None)

    def targets(self, groups: Sequence[Group], beta: float, iteration: int) -> Targets:
        """Minibatches of whole groups in a shuffled order, cut into micro-batches once, with their targets."""
        trainer, precision = self.trainer, self.trainer.precision
        order = permutation(len(groups), trainer.seed, "minibatches", iteration)
        step = groups_each(self.settings.minibatch, sum(1 for s in groups[0] if s.facts.get("answer")))
        cuts = [[groups[i] for i in order[at : at + step]] for at in range(0, len(order), step)]
        minibatches = [trainer.forests(trainer.share(cut)) for cut in cuts]
        passes = [max(made) for made in zip(*trainer.strategy.gather(list(map(len, minibatches))), strict=True)]
        with fast_products(trainer.strategy.device, precision), evaluating(trainer.module):
            targets = make_targets(
                trainer.engine,
                self._reference,
                minibatches,
                beta,
                self.settings,
                temperature=self.temperature,
                reference_head=self.phase.reference_head,
                gather=trainer.strategy.gather,
                passes=passes,
            )
            if iteration == 0:
                ppo_checks.require_zero_kl(targets.largest_kl, precision)
            first = targets.minibatches[0]
            first = [*first, *first[-1:] * (passes[0] - len(first))]
            ppo_checks.require_ratio_one(trainer.engine, first, wanted(self.settings), self.temperature, precision)
        return targets

    def optimise(self, targets: Targets, beta: float, iteration: int) -> dict[str, float]:
        """Every minibatch once an epoch, in the order of the targets first and shuffled from then on.

        Ends early where the KL to the policy that sampled exceeds `kl.stop`.
        """
        self.phase.beta = beta if self.settings.kl.where == "loss" else 0.0
        self.phase.warming = self.settings.has_critic and iteration < self.settings.critic.warmup
        self.trainer.held = ("policy.",) if self.phase.warming else ()
        seen: list[dict[str, float]] = []
        for number in self._order(len(targets.minibatches), iteration):
            forests, weights = self._work(targets.minibatches[number])
            seen.append(self.trainer.step(forests, weights))
            self.after_update()
            if self.settings.kl.stop is not None and seen[-1]["approx_kl"] > self.settings.kl.stop:
                break
        names = dict.fromkeys(name for figures in seen for name in figures)
        means = {k: sum(f[k] for f in seen if k in f) / sum(k in f for f in seen) for k in names}
        wanted_figures = {k: v for k, v in means.items() if k not in ("tokens", "ratio", "learning_rate")}
        return wanted_figures | {
            "first_ratio": seen[0]["ratio"],
            "updates": len(seen),
            "trained_tokens": sum(f["tokens"] for f in seen),
        }

    def _order(self, count: int, iteration: int) -> list[int]:
        order = list(range(count))
        for epoch in range(1, self.settings.epochs):
            order += permutation(count, self.trainer.seed, "epoch", iteration, epoch)
        return order

    def _work(self, forests: list[Forest]) -> tuple[list[Forest], dict[str, float]]:
        """This rank's forests of an update, other records with them, and the weight of every term."""
        total = sum(token_weights(f, answers(f), self.settings.average_over)[1] for f in forests)
        weights, everything = {TERM: total}, list(forests)
        for stream in () if self.phase.warming else self.mix:
            more = self.trainer.forests(self.trainer.share(stream.batch(self.trainer.done)))
            weights[stream.term] = float(sum(f.weights_T.sum() for f in more))
            everything += more
        return everything, weights

    def _reference(self, forest: Forest, **options: Any) -> Any:
        with self.trainer.engine.autocast():
            return self.reference(forest, **options)
