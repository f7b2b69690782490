"""PPO's loss on one forest, in the form that the loop takes: sums by term, divided once by the loop.

    tokens        clipped policy loss, value loss, entropy bonus and, where it belongs there, the KL penalty, each
                  token weighing 1, or 1 / length of its answer (`average_over: answers`)
    pretraining, sft    the negative log-likelihood of other records, in forests of their own

A forest of answers carries what `train/ppo.py` put there: old_logprobs, advantages, weight, and, where they are used,
old_values, returns, importance, reference_logprobs, reference_states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algo.kl import ESTIMATORS
from pipeline.algo.output import sums
from pipeline.algo.policy import clipped_policy_loss, clipped_value_loss
from pipeline.data.forest import Forest, Group
from pipeline.llama.heads import Compared, TokenOutputs
from pipeline.train.loop import LossFunction, LossSums
from pipeline.train.ppo_settings import PpoSettings

MIXED = ("pretraining", "sft")  # terms of other records, by the fact `mixed`: 1, 2
TERM = "tokens"


@dataclass
class Phase:
    """What changes from iteration to iteration."""

    beta: float = 0.0  # KL coefficient inside the loss
    warming: bool = False  # the critic alone is trained
    reference_head: Any = None  # for the exact KL


def wanted(settings: PpoSettings) -> tuple[str, ...]:
    return ("logprobs", "entropy", "values") if settings.has_critic else ("logprobs", "entropy")


def ppo_loss(settings: PpoSettings, temperature: float, phase: Phase) -> LossFunction:
    """`phase` is read at every call. Every pass touches every parameter, so that ranks keep step."""
    want = wanted(settings)

    def loss(module: Callable[..., Any], forest: Forest) -> LossSums:
        if "mixed" in forest.facts:
            return _mixed(module(forest, want=want), forest)
        mask = forest.weights_T > 0
        in_loss = settings.kl.where == "loss" and phase.beta > 0
        compared = None
        if in_loss and settings.kl.estimator == "exact":
            compared = Compared(forest.tokens["reference_states"], phase.reference_head)
        now = module(forest, want=want, temperature=temperature, compared=compared, detached=phase.warming)
        weight_T = forest.tokens["weight"]
        policy = clipped_policy_loss(
            now.logprobs_T,
            forest.tokens["old_logprobs"],
            forest.tokens["advantages"],
            mask,
            clip=settings.clip,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            importance=forest.tokens.get("importance"),
        )
        metrics = {**policy.metrics, "entropy": sums(now.entropy_T, mask)}
        moving = policy.losses
        if settings.entropy_coefficient:
            moving = moving - settings.entropy_coefficient * now.entropy_T * mask
        if in_loss:
            kl_T = _kl(settings.kl.estimator, now, forest, mask)
            metrics["kl_loss"] = sums(kl_T, mask)
            moving = moving + phase.beta * kl_T
        # while the critic warms up the policy's pass still touches its parameters
        total = (moving * weight_T).sum() * (0.0 if phase.warming else 1.0)
        if settings.has_critic:
            value = clipped_value_loss(
                now.values_T,
                forest.tokens["old_values"],
                forest.tokens["returns"],
                mask,
                clip=settings.value_clip,
            )
            metrics |= value.metrics
            total = total + settings.value_coefficient * (value.losses * weight_T).sum()
        return LossSums({TERM: total}, metrics)

    return loss


def _kl(estimator: str, now: TokenOutputs, forest: Forest, mask: Tensor) -> Tensor:
    if estimator == "exact":
        assert now.kl_T is not None
        return now.kl_T
    assert now.logprobs_T is not None
    return ESTIMATORS[estimator](now.logprobs_T, forest.tokens["reference_logprobs"], mask)


def _mixed(now: TokenOutputs, forest: Forest) -> LossSums:
    """Negative log-likelihood of the weighted tokens, under the term that the records belong to."""
    assert now.logprobs_T is not None
    number = int(forest.facts["mixed"].max())
    term = MIXED[number - 1]
    loss = -(now.logprobs_T * forest.weights_T).sum()
    if now.values_T is not None:
        loss = loss + 0.0 * now.values_T.sum()
    return LossSums({term: loss}, {f"{term}_nll": (loss.detach(), forest.weights_T.sum())})


def mark_mixed(groups: Sequence[Group], term: str) -> list[Group]:
    """The same groups with the fact that tells their forests from those of answers."""
    number = float(MIXED.index(term) + 1)
    return [[replace(s, facts={**s.facts, "mixed": number}) for s in group] for group in groups]


def token_weights(forest: Forest, at: Tensor, average_over: str) -> tuple[Tensor, float]:
    """[T] what each token of the answers `at` counts, and what all of them count together."""
    mask = forest.weights_T > 0
    if average_over == "tokens":
        return mask.float(), float(mask.sum())
    trained = torch.zeros_like(forest.start_S, dtype=torch.float32).index_add(0, forest.segment_T, mask.float())
    share = torch.where(trained > 0, 1.0 / trained.clamp(min=1.0), 0.0)
    return share[forest.segment_T] * mask, float((trained[at] > 0).sum())
