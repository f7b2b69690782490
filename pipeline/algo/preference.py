"""Losses on preference pairs given log-probs of whole responses.

A preference loss is a frozen dataclass: its fields are its hyperparameters (with a sentence each, which
settings and help show), `needs_reference` says whether reference log-probs must be computed, calling it with
`PairLogps` gives a `LossOutput`. To add one: write the class, add it to the `PreferenceLoss` union; `LOSSES`
follows it.

Legend: P pairs.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pipeline.algo.output import LossOutput, agreement, sums


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of the chosen and the rejected response of each pair, summed (not averaged) over tokens.

    policy_chosen, policy_rejected          [P] with gradient
    reference_chosen, reference_rejected    [P], None where the loss needs no reference
    length_chosen, length_rejected          [P] response tokens that the sums run over, end of turn included
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    length_chosen: Tensor
    length_rejected: Tensor

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi(y|x) - log pi_ref(y|x) of both [P], float32. ValueError without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference: PairLogps holds no reference log-probs")
        chosen = self.policy_chosen.float() - self.reference_chosen.detach().float()
        rejected = self.policy_rejected.float() - self.reference_rejected.detach().float()
        return chosen, rejected


@dataclass(frozen=True)
class Sigmoid:
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing as in Mitchell's note on conservative DPO.

    h = (log pi(c)/ref(c)) - (log pi(r)/ref(r)), from sums over tokens
    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)          e = label_smoothing

    With policy == reference h is 0 and the loss is exactly ln 2 for every beta and e.
    """

    name: ClassVar[str] = "sigmoid"
    needs_reference: ClassVar[bool] = True

    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference; > 0."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of flipped labels; at least 0, below 0.5."}
    )

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), not {self.label_smoothing}")

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss [P] and the sums behind rewards, margin, accuracy. Rewards are beta * log ratio (eq. 5)."""
        chosen, rejected = logps.log_ratios()
        logits = self.beta * (chosen - rejected)
        e = self.label_smoothing
        losses = -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
        return LossOutput(losses, _metrics(logps, losses, self.beta * chosen, self.beta * rejected))


def _metrics(logps: PairLogps, losses: Tensor, reward_chosen: Tensor, reward_rejected: Tensor) -> dict[str, Any]:
    margins = reward_chosen - reward_rejected
    return {
        "loss": sums(losses),
        "reward_chosen": sums(reward_chosen),
        "reward_rejected": sums(reward_rejected),
        "margin": sums(margins),
        "accuracy": agreement(margins),
        "logp_chosen": sums(logps.policy_chosen),
        "logp_rejected": sums(logps.policy_rejected),
    }


PreferenceLoss = Sigmoid  # the union of all losses: Sigmoid | Next | ...

_classes = typing.get_args(PreferenceLoss) or (PreferenceLoss,)  # a union of one is the class itself
LOSSES: dict[str, type[PreferenceLoss]] = {c.name: c for c in _classes}


def make_loss(name: str, **hyperparameters: float) -> PreferenceLoss:
    """The loss of that name. ValueError for an unknown name or hyperparameter, or a value out of range."""
    if name not in LOSSES:
        raise ValueError(f"no preference loss named {name!r}; there are: {', '.join(sorted(LOSSES))}")
    cls = LOSSES[name]
    known = [f.name for f in fields(cls)]
    unknown = set(hyperparameters) - set(known)
    if unknown:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; it has: {', '.join(known)}")
    return cls(**hyperparameters)
