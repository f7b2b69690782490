"""Mixture of experts as in Mixtral (Jiang et al. 2024, section 2.1): every token goes to k of E gated feed-forwards.

The router is a softmax over the logits of the k chosen experts. Router and experts are transformers' own modules, so
names, numbers and the choice of products on a GPU are Mixtral's.

    balance(logits_LTE, k)     the load-balancing loss of Switch Transformer (Fedus et al. 2021, equations 4 to 6), over
                               the tokens of all layers together as transformers has it: k where all get the same share

`pipeline/train/balance.py` adds it to every step of training.
Shapes: L layers, T tokens, E experts.
"""

from __future__ import annotations

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
    """`loss` takes all layers together; the others are means over layers, where one that collapsed shows."""

    loss: Tensor
    busiest: Tensor  # share of a layer's assignments that its busiest expert got, 1 / E at best
    idlest: Tensor
    entropy: Tensor  # nats, of a router's mean distribution, ln E at best


def balance(logits_LTE: Tensor, each: int) -> Balance:
    """Router logits -> E * sum over experts of (tokens that chose it / tokens) * (mean probability), and figures."""
    probs_LTE = logits_LTE.float().softmax(-1)
    experts = probs_LTE.shape[-1]
    chosen = probs_LTE.topk(each, dim=-1).indices
    assigned_LE = torch.stack([torch.bincount(layer.flatten(), minlength=experts) for layer in chosen]).float()
    per_token_LE, mean_LE = assigned_LE / probs_LTE.shape[1], probs_LTE.mean(1)
    share_LE, spread_LE = per_token_LE / each, mean_LE.detach()
    return Balance(
        loss=experts * (per_token_LE.mean(0) * mean_LE.mean(0)).sum(),
        busiest=share_LE.amax(1).mean(),
        idlest=share_LE.amin(1).mean(),
        entropy=-torch.xlogy(spread_LE, spread_LE).sum(1).mean(),
    )
