"""The loss functions of the supervised stages, in the form that the loop takes: (module, forest) -> sums.

Each makes exactly one forward pass of the whole module and returns plain sums; the loop divides by weights that the
plan stated before (`weigh_...` beside each loss says which).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.algo.output import sums
from pipeline.algo.preference import Kto, PairLogps, PairLoss, UnpairedLogps
from pipeline.algo.reward import Pairs, centring_penalty, ranking_loss, ranking_pairs
from pipeline.data.forest import Forest, Group
from pipeline.data.groups import answer_sums, answers, sum_by_segment
from pipeline.llama.heads import at_last
from pipeline.train.loop import LossFunction, LossSums
from pipeline.train.metrics import Number

ROUNDS_LOGGED = 4  # rounds with a figure of their own; later ones share the last


def next_token(module: Callable[..., Any], forest: Forest) -> LossSums:
    """Cross-entropy of the trained tokens, in nats."""
    out = module(forest)
    loss = -(out.logprobs_T * forest.weights_T).sum()
    return LossSums({"tokens": loss}, {"nll": (loss.detach(), forest.weights_T.sum())})


def per_round(module: Callable[..., Any], forest: Forest) -> LossSums:
    """The same, with loss and accuracy (share of tokens that were the likeliest) of every round of the dialogue."""
    out = module(forest, accuracy=True)
    weights = forest.weights_T
    nll = -out.logprobs_T * weights
    correct = out.correct_T * (weights > 0)
    metrics = {"nll": (nll.detach().sum(), weights.sum()), "accuracy": (correct.sum(), (weights > 0).sum())}
    round_T = forest.tokens["round"].clamp(max=ROUNDS_LOGGED - 1)
    for number in range(ROUNDS_LOGGED):
        here = (round_T == number) & (weights > 0)
        metrics[f"round{number + 1}/nll"] = (nll.detach()[here].sum(), weights[here].sum())
        metrics[f"round{number + 1}/accuracy"] = (correct[here].sum(), here.sum())
    return LossSums({"tokens": nll.sum()}, metrics)


def _pairs_of(forest: Forest, weight_by: str) -> tuple[Tensor, Pairs]:
    at = answers(forest)
    return at, ranking_pairs(forest.facts["worth"][at], forest.group_S[at], weight_by=weight_by)


def weigh_pairs(weight_by: str) -> Callable[[Sequence[Group]], dict[str, float]]:
    """{"pairs": summed weights of the ordered pairs of these groups}, as `ranking_pairs` gives them."""

    def weigh(groups: Sequence[Group]) -> dict[str, float]:
        total = 0.0
        for group in groups:
            worth = [s.facts["worth"] for s in group if s.facts.get("answer")]
            ordered = sum(a > b for a in worth for b in worth)
            total += ordered if weight_by == "pair" else 2.0 * ordered / (len(worth) * (len(worth) - 1))
        return {"pairs": total}

    return weigh


def pairwise_ranking(weight_by: str, centring: float) -> LossFunction:
    """-log sigmoid(better - worse) over all ordered pairs of answers to one prompt, scores at the last real token."""

    def loss(module: Callable[..., Any], forest: Forest) -> LossSums:
        scores_S = at_last(module(forest), forest)
        at, pairs = _pairs_of(forest, weight_by)
        scores_N = scores_S[at]
        out = ranking_loss(scores_N, pairs)
        total = out.losses.sum() + 0.0 * scores_N.sum()  # keeps the graph where every pair is a tie
        if centring:
            both = centring_penalty(scores_N[pairs.better_P], scores_N[pairs.worse_P])
            total = total + centring * (both * pairs.weight_P).sum()
        longer = forest.length_S[at]
        margin = (longer[pairs.better_P] - longer[pairs.worse_P]).float()
        by_length = ((margin > 0).float() + 0.5 * (margin == 0).float()).sum()
        metrics: dict[str, tuple[Number, Number]] = {**out.metrics, "length_accuracy": (by_length, margin.numel())}
        return LossSums({"pairs": total}, metrics)

    return loss


def preference(loss_fn: PairLoss) -> LossFunction:
    """A loss on pairs of whole answers; reference log-probs, where it needs them, stand in the fact `reference`."""

    def loss(module: Callable[..., Any], forest: Forest) -> LossSums:
        logprobs_T = module(forest).logprobs_T
        at, pairs = _pairs_of(forest, "pair")
        policy, length = (x_S[at] for x_S in answer_sums(logprobs_T, forest))
        nll = -sum_by_segment(logprobs_T, forest)[at] / forest.length_S[at].clamp(min=1)
        reference = forest.facts["reference"][at] if loss_fn.needs_reference else None
        better, worse = pairs.better_P, pairs.worse_P
        out = loss_fn(
            PairLogps(
                policy_chosen=policy[better],
                policy_rejected=policy[worse],
                reference_chosen=None if reference is None else reference[better],
                reference_rejected=None if reference is None else reference[worse],
                length_chosen=length[better],
                length_rejected=length[worse],
                nll_chosen=nll[better],
            )
        )
        return LossSums({"pairs": out.losses.sum() + 0.0 * policy.sum()}, out.metrics)  # a graph without any pair too

    return loss


def unpaired(loss_fn: Kto, reference_point: float) -> LossFunction:
    """A loss on single rated answers, given the reference point of the whole step."""

    def loss(module: Callable[..., Any], forest: Forest) -> LossSums:
        summed_S = sum_by_segment(module(forest).logprobs_T, forest)
        at = answers(forest)
        logps = UnpairedLogps(
            policy=summed_S[at],
            reference=forest.facts["reference"][at],
            desirable=forest.facts["desirable"][at] > 0,
            reference_point=reference_point,
        )
        out = loss_fn(logps)
        return LossSums({"answers": out.losses.sum()}, out.metrics)

    return loss


def weigh_answers(groups: Sequence[Group]) -> dict[str, float]:
    """{"answers": how many answers these groups hold}."""
    return {"answers": float(sum(bool(s.facts.get("answer")) for group in groups for s in group))}


def unrelated_log_ratio(module: Callable[..., Any], forest: Forest) -> LossSums:
    """No loss: the mean log ratio of policy to reference of answers to other prompts, nats an answer."""
    at = torch.nonzero(forest.facts["unrelated"] > 0).squeeze(1)
    ratio = sum_by_segment(module(forest).logprobs_T, forest)[at] - forest.facts["reference"][at]
    return LossSums({}, {"log_ratio": sums(ratio)})


@torch.no_grad()
def summed_logprobs(module: Callable[..., Any], forests: Sequence[Forest]) -> list[Tensor]:
    """[S] summed log-probs of the weighted tokens of each segment, for every forest."""
    return [sum_by_segment(module(forest).logprobs_T, forest) for forest in forests]
