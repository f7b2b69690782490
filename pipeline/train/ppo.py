"""What PPO does between two rollouts: targets from the policy that sampled, and the loss on them.

A minibatch is a list of forests of whole prompt groups. They are built once an iteration; old log-probs and values
are computed on the very forests that the first epoch trains on, so that its first ratio is exactly 1.

Legend: T tokens of a forest, N answers in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.algo.advantages import gae_ragged, moments, shaped_rewards_ragged, whiten
from pipeline.algo.kl import k1
from pipeline.algo.policy import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    explained_variance_sums,
)
from pipeline.data.forest import Forest, Group
from pipeline.data.groups import answers
from pipeline.flow.artifacts import RewardModel
from pipeline.flow.errors import RowFailed
from pipeline.llama.adapters import LoraSettings
from pipeline.llama.heads import ActorCritic, PolicyModel
from pipeline.llama.open import Trainable, open_trainable_classifier
from pipeline.train.arithmetic import fast_products
from pipeline.train.loop import LossFunction, LossSums, Trainer, evaluating
from pipeline.train.randomness import permutation

WANT = ("logprobs", "entropy", "values")
Reduce = Callable[[Tensor], Tensor]  # sums a float64 tensor over all ranks


@dataclass(frozen=True)
class Objective:
    """Hyperparameters of targets and loss; each is a setting of the stage."""

    gamma: float
    lam: float
    clip: float
    value_clip: float | None
    value_coefficient: float
    entropy_coefficient: float
    temperature: float


@dataclass(frozen=True)
class Targets:
    """Minibatches whose forests carry old_logprobs, old_values, advantages and returns, and what was measured."""

    minibatches: list[list[Forest]]
    figures: dict[str, float]
    largest_kl: float  # largest |log ratio to the reference| of a token, exactly 0 in the first iteration


@torch.no_grad()
def make_targets(
    actor: Callable[..., Any],
    reference: Callable[..., Any],
    minibatches: list[list[Forest]],
    beta: float,
    objective: Objective,
    reduce: Reduce = lambda x: x,
) -> Targets:
    """Old log-probs, values and reference log-probs to shaped rewards, advantages (whitened over all ranks), returns.

    Each forest has the fact `score` on its answers (Ouyang et al. 2022, section 3.5: reward = score - beta * KL).
    """
    done: list[list[Forest]] = []
    spread = torch.zeros(3, dtype=torch.float64)
    explained = torch.zeros(5, dtype=torch.float64)
    kl_sum, rows, largest = 0.0, 0, 0.0
    for forests in minibatches:
        done.append([])
        for forest in forests:
            mask = forest.weights_T > 0
            old = actor(forest, want=WANT, temperature=objective.temperature)
            base = reference(forest, temperature=objective.temperature)
            kl = k1(old.logprobs_T, base.logprobs_T, mask)
            at = answers(forest)
            start, length = forest.start_S[at], forest.length_S[at]
            rewards = shaped_rewards_ragged(kl, forest.facts["score"][at], start, length, beta)
            advantages, returns = gae_ragged(
                rewards, old.values_T, start, length, gamma=objective.gamma, lam=objective.lam, mask_T=mask
            )
            spread += moments(advantages, mask).cpu()
            explained += explained_variance_sums(old.values_T, returns, mask).cpu()
            kl_sum, rows = kl_sum + float(kl.sum()), rows + at.numel()
            largest = max(largest, float(kl.abs().max()))
            done[-1].append(
                forest.with_tokens(
                    old_logprobs=old.logprobs_T, old_values=old.values_T, advantages=advantages, returns=returns
                )
            )
    totals = reduce(spread)
    kl_total = reduce(torch.tensor([kl_sum, rows], dtype=torch.float64))
    explained = reduce(explained)
    whitened = [
        [f.with_tokens(advantages=whiten(f.tokens["advantages"], f.weights_T > 0, totals=totals)) for f in forests]
        for forests in done
    ]
    variance = explained_variance(explained)
    figures = {
        "kl": float(kl_total[0] / kl_total[1].clamp(min=1)),
        "explained_variance": math.nan if variance is None else variance,
        "return": float(explained[1] / explained[0].clamp(min=1)),
    }
    return Targets(whitened, figures, largest)


def ppo_loss(objective: Objective) -> LossFunction:
    """Sums over response tokens of the clipped policy loss, the clipped value loss and minus the entropy."""

    def loss(module: Callable[..., Any], forest: Forest) -> LossSums:
        mask = forest.weights_T > 0
        now = module(forest, want=WANT, temperature=objective.temperature)
        policy = clipped_policy_loss(
            now.logprobs_T, forest.tokens["old_logprobs"], forest.tokens["advantages"], mask, clip=objective.clip
        )
        value = clipped_value_loss(
            now.values_T, forest.tokens["old_values"], forest.tokens["returns"], mask, clip=objective.value_clip
        )
        total = policy.losses.sum() + objective.value_coefficient * value.losses.sum()
        if objective.entropy_coefficient:
            total = total - objective.entropy_coefficient * (now.entropy_T * mask).sum()
        entropy = (now.entropy_T.detach() * mask).sum()
        return LossSums(
            terms={"tokens": total},
            metrics={**policy.metrics, **value.metrics, "entropy": (entropy, mask.sum())},
        )

    return loss


class PromptStream:
    """Batches of prompt numbers, shuffled epoch after epoch; what an iteration sees follows from its number alone."""

    def __init__(self, prompts: int, size: int | None, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.size = min(size or prompts, prompts)

    def batch(self, iteration: int) -> list[int]:
        """Without repeats inside a batch: what is left of an epoch and too small for one is not used."""
        epoch, place = divmod(iteration, self.prompts // self.size)
        order = permutation(self.prompts, self.seed, "prompts", epoch)
        return order[place * self.size : (place + 1) * self.size]


def open_actor_critic(policy: Trainable, reward: RewardModel, adapter: LoraSettings | None, seed: int) -> ActorCritic:
    """The policy with a critic that starts as the reward model."""
    return ActorCritic(cast(PolicyModel, policy.module), open_trainable_classifier(reward, adapter, seed).module)


def groups_each(minibatch: int, samples: int) -> int:
    """Prompt groups in a minibatch of that many samples: whole ones, at least one."""
    return max(1, minibatch // max(1, samples))


class Learner:
    """Actor and critic with their reference: targets from a rollout, then a few epochs of updates on them."""

    def __init__(
        self,
        trainer: Trainer,
        reference: nn.Module,
        objective: Objective,
        *,
        epochs: int,
        minibatch: int,
    ) -> None:
        self.trainer, self.reference, self.objective = trainer, reference, objective
        self.epochs, self.minibatch = epochs, minibatch

    def targets(self, groups: Sequence[Group], beta: float, iteration: int) -> Targets:
        """Minibatches of whole groups in a shuffled order, cut into micro-batches once, with their targets."""
        trainer = self.trainer
        order = permutation(len(groups), trainer.seed, "minibatches", iteration)
        step = groups_each(self.minibatch, sum(1 for s in groups[0] if s.facts.get("answer")))
        cuts = [[groups[i] for i in order[at : at + step]] for at in range(0, len(order), step)]
        with fast_products(trainer.strategy.device, trainer.settings.precision), evaluating(trainer.module):
            minibatches = [trainer.forests(trainer.share(cut)) for cut in cuts]
            targets = make_targets(trainer.engine, self._reference, minibatches, beta, self.objective, self._reduce)
            if iteration == 0:
                require_zero_kl(targets.largest_kl, trainer.settings.precision)
            require_ratio_one(trainer.engine, targets.minibatches[0], self.objective, trainer.settings.precision)
        return targets

    def optimise(self, targets: Targets, iteration: int) -> dict[str, float]:
        """Every minibatch once an epoch, in the order of the targets first and shuffled from then on."""
        count = len(targets.minibatches)
        seen: list[dict[str, float]] = []
        for epoch in range(self.epochs):
            keys = (self.trainer.seed, "epoch", iteration, epoch)
            for number in range(count) if epoch == 0 else permutation(count, *keys):
                forests = targets.minibatches[number]
                weight = float(sum((f.weights_T > 0).sum() for f in forests))
                seen.append(self.trainer.step(forests, {"tokens": weight}))
        wanted = ("loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "approx_kl", "gradient_norm")
        means = {k: sum(f[k] for f in seen) / len(seen) for k in wanted if k in seen[0]}
        return means | {"first_ratio": seen[0]["ratio"], "trained_tokens": sum(f["tokens"] for f in seen)}

    def _reference(self, forest: Forest, **options: Any) -> Any:
        with self.trainer.engine.autocast():
            return self.reference(forest, **options)

    def _reduce(self, totals: Tensor) -> Tensor:
        return torch.tensor(self.trainer.strategy.gather(totals.tolist()), dtype=torch.float64).sum(0)


@torch.no_grad()
def require_ratio_one(
    actor: Callable[..., Any], forests: Iterable[Forest], objective: Objective, precision: str
) -> None:
    """Before the first update of an iteration every probability ratio is exactly 1; raises naming likely causes.

    In bf16 the tolerance is 1e-6 (the same kernels on the same forests still give the same bits on a CPU).
    """
    tolerance = 0.0 if precision == "fp32" else 1e-6
    for forest in forests:
        now = actor(forest, want=WANT, temperature=objective.temperature)
        off = float((now.logprobs_T - forest.tokens["old_logprobs"]).abs().max())
        if not off <= tolerance:
            raise RowFailed(
                f"before the first update a token's log ratio is {off:.3g}, not 0: the policy that is trained is not "
                "the one whose old log-probs were taken (dropout active? other weights? another temperature?)"
            )


def require_zero_kl(largest: float, precision: str) -> None:
    """In the first iteration policy and reference are the same: every token's log ratio is exactly 0."""
    if not largest <= (0.0 if precision == "fp32" else 1e-6):
        raise RowFailed(
            f"in the first iteration a token's log ratio to the reference is {largest:.3g}, not 0: the reference is "
            "not the policy that this row starts from (adapter merged or left out? other precision? dropout active?)"
        )
