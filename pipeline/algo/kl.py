"""Kullback-Leibler divergence between policy and reference: estimators, the exact value, coefficient control.

Estimators from samples of policy p against reference q (Schulman 2020, "Approximating KL divergence"),
with r = log p(x) - log q(x):

    k1 = r                   unbiased, signed, high variance: what the PPO reward is shaped by
    k2 = r^2 / 2             biased, non-negative
    k3 = exp(-r) - 1 + r     unbiased, non-negative, low variance: for logging

Inside a reward the policy gradient with k1 is that of the KL. With the others it is not: k2's and k3's are biased,
and `exact_kl` of a state does not depend on the token drawn there, so only what later states cost is felt. Inside a
*loss* it is k1 and k3 that are wrong: the gradient of k1 has expectation 0, that of k3 is the gradient of KL(q||p); k2
(or `exact_kl`) has the right one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.algo.output import keep


def log_ratio(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log p - log q by token, 0 where masked. All of one shape."""
    return keep(logprobs, mask) - keep(reference, mask)


def k1(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    return log_ratio(logprobs, reference, mask)


def k2(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * log_ratio(logprobs, reference, mask).square()


def k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    r = log_ratio(logprobs, reference, mask)
    return torch.expm1(-r) + r


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def exact_kl(logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) over the full vocabulary, nats, from finite logits [..., V] -> [...]; 0 where masked [...].

    Softmax in float32 (or wider): in bf16 the difference of two close log-probs is noise.
    """
    if mask is not None:
        logits, reference_logits = keep(logits, mask[..., None]), keep(reference_logits, mask[..., None])
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.to(wide), dim=-1)
    log_q = torch.log_softmax(reference_logits.to(wide), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that never moves."""

    kind: ClassVar[str] = "fixed"
    coefficient: float

    def update(self, kl: float, samples: int) -> FixedKL:
        return self

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class AdaptiveKL:
    """Proportional control in log space towards a target KL (Ziegler et al. 2019, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2);   coefficient *= 1 + e * samples / horizon

    target   nats a response (the KL summed over its tokens, averaged over responses)
    horizon  responses
    """

    kind: ClassVar[str] = "adaptive"
    coefficient: float
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(f"target and horizon must be above 0, not {self.target} and {self.horizon}")

    def update(self, kl: float, samples: int) -> AdaptiveKL:
        """The controller after an iteration of `samples` responses whose mean KL was `kl`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * samples / self.horizon))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class BandKL:
    """A coefficient that moves only where the KL leaves a band (Schulman et al. 2017, section 4: factor 2, and
    a band from target / 1.5 to target * 1.5).

    low, high   nats a response; above `high` the coefficient is multiplied by `factor`, below `low` divided by it
    """

    kind: ClassVar[str] = "band"
    coefficient: float
    low: float = 4.0
    high: float = 9.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high and self.factor > 1):
            raise ValueError(
                f"a band needs 0 <= low < high and a factor above 1, not {self.low}, {self.high}, {self.factor}"
            )

    def update(self, kl: float, samples: int) -> BandKL:
        """The controller after an iteration whose mean KL a response was `kl`; `samples` does not matter."""
        moved = self.factor if kl > self.high else 1.0 / self.factor if kl < self.low else 1.0
        return replace(self, coefficient=self.coefficient * moved)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


KLController = FixedKL | AdaptiveKL | BandKL


def controller(state: dict[str, Any]) -> KLController:
    """A controller from what `.state()` gave (JSON). ValueError for an unknown kind."""
    rest = {k: v for k, v in state.items() if k != "kind"}
    for cls in (FixedKL, AdaptiveKL, BandKL):
        if cls.kind == state.get("kind"):
            return cls(**rest)
    raise ValueError(f"KL control must be 'fixed', 'adaptive' or 'band', not {state.get('kind')!r}")
