"""Mixture of experts as in Mixtral (Jiang et al. 2024, section 2.1): every token goes to k of E gated feed-forwards.

The router is a softmax over the logits of the k chosen experts. Router and experts are transformers' own modules, so
names, numbers and the choice of products on a GPU are Mixtral's.

    balance(logits, k)     the load-balancing loss of Switch Transformer (Fedus et al. 2021, equations 4 to 6), over the
                           tokens of all layers together as transformers has it: k where all experts get the same share

`pipeline/train/balance.py` adds it to every step of training.
Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter


class Experts(nn.Module):
    """What the router said in the last training forward stays in `routed` [tokens, E]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = MixtralTopKRouter(config)
        self.experts = MixtralExperts(config)
        self.coefficient, self.each = config.router_aux_loss_coef, config.num_experts_per_tok
        self.routed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        logits, weights, chosen = self.gate(flat)
        if self.training and torch.is_grad_enabled():
            self.routed = logits
        return self.experts(flat, chosen, weights).view_as(x)


def initialise(module: nn.Module, spread: float) -> None:
    """New weights of a router or of experts, as Mixtral's."""
    if isinstance(module, (MixtralTopKRouter, MixtralExperts)):
        for weight in module.parameters():
            initialization.normal_(weight, std=spread)


class Balance(NamedTuple):
    loss: Tensor
    busiest: Tensor  # share of all assignments that the busiest expert got, 1 / E at best
    idlest: Tensor
    entropy: Tensor  # nats, of the router's mean distribution, ln E at best


def balance(logits: Sequence[Tensor], each: int) -> Balance:
    """Router logits [T, E] by layer -> E * sum over experts of (tokens that chose it / T) * (mean probability)."""
    probs = torch.cat(tuple(logits)).float().softmax(-1)
    experts = probs.shape[1]
    assigned = torch.bincount(probs.topk(each, dim=-1).indices.flatten(), minlength=experts).float()
    mean, share = probs.mean(0), assigned / assigned.sum()
    spread = mean.detach()
    entropy = -torch.xlogy(spread, spread).sum()
    return Balance(experts * (assigned / len(probs) * mean).sum(), share.max(), share.min(), entropy)
