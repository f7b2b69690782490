"""Reward-model losses on scalar scores: Bradley-Terry on pairs and on all pairs of a ranking.

Legend: N scored completions of a batch, P pairs drawn from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.algo.output import LossOutput, agreement, sums


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) by pair (Ouyang et al. 2022, eq. 1).

    The margin is that of Touvron et al. 2023 (Llama 2), eq. 2.
    Any broadcastable shapes. Stable for any difference: at -1000 the loss is 1000 and its gradient -1.
    """
    return -F.logsigmoid(chosen.float() - rejected.float() - margin)


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 by pair (Eisenstein et al. 2023): fixes the level that pairs leave open."""
    return (chosen.float() + rejected.float()).square()


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs among N completions, as indices.

    better_P, worse_P   int64, indices into the N completions
    weight_P            float32, what each pair counts in the loss
    ties                pairs of equal worth, which are left out
    """

    better_P: Tensor
    worse_P: Tensor
    weight_P: Tensor
    ties: int


def ranking_pairs(worth_N: Tensor, group_N: Tensor, *, weight_by: str = "pair") -> Pairs:
    """All strictly ordered pairs within each group (the completions of one prompt), better one first.

    worth_N    higher is better (for a ranking: minus the rank); equal worth is a tie
    group_N    which prompt a completion belongs to
    weight_by  "pair": every pair counts 1; "prompt": 1 / C(K, 2) with K completions in the group, ties
               included, as InstructGPT does (Ouyang et al. 2022, eq. 1)

    Pairs come ordered by (better, worse) index. ValueError for another weight_by.
    """
    if weight_by not in ("pair", "prompt"):
        raise ValueError(f"weight_by must be 'pair' or 'prompt', not {weight_by!r}")
    together_NN = group_N[:, None] == group_N[None, :]
    better, worse = torch.nonzero(together_NN & (worth_N[:, None] > worth_N[None, :]), as_tuple=True)
    equal_NN = together_NN & (worth_N[:, None] == worth_N[None, :])
    ties = int((equal_NN.sum() - worth_N.numel()) // 2)  # without the diagonal, each once
    weight = torch.ones(better.numel(), dtype=torch.float32, device=worth_N.device)
    if weight_by == "prompt":
        size_N = together_NN.sum(1).to(torch.float32)
        weight = 2.0 / (size_N * (size_N - 1))[better]
    return Pairs(better, worse, weight, ties)


def ranking_loss(scores_N: Tensor, pairs: Pairs, margin_P: Tensor | None = None) -> LossOutput:
    """Weighted pairwise losses [P]; divide their sum by `pairs.weight_P.sum()` over the whole step.

    Metrics are by pair and unweighted: loss, margin, accuracy (an exact tie counts half).
    """
    better, worse = scores_N[pairs.better_P].float(), scores_N[pairs.worse_P].float()
    losses = pairwise_loss(better, worse, 0.0 if margin_P is None else margin_P)
    margins = better - worse
    metrics = {
        "loss": sums(losses),
        "margin": sums(margins),
        "accuracy": agreement(margins),
        "score": sums(scores_N),
    }
    return LossOutput(losses * pairs.weight_P, metrics)
