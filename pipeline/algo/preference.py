"""Losses on human preferences given log-probs of whole answers: pairs of them, or single answers rated by themselves.

A preference loss is a frozen dataclass that is called with `PairLogps` (an unpaired one with `UnpairedLogps`) and gives
a `LossOutput`. Its fields are its hyperparameters, each with a sentence and its bounds, which settings and help show.

    name              what settings call it
    paired            whether it compares two answers to one prompt
    needs_reference   whether reference log-probs must be computed
    content_only      whether the control tokens of an answer (headers, end of turn) are left out of its sum
    start(figures)    the mean loss where policy and reference agree, None where it is not known

    r = log pi(y|x) - log ref(y|x), h = r_c - r_r     sums over tokens; c chosen, r rejected, |y| tokens of y
    m = log pi(y|x) / |y|                             s the logistic function, b beta

    sigmoid        -log s(b h)                                 DPO; label_smoothing makes it conservative DPO
    robust         sigmoid, unbiased under label flips         Chowdhury et al. 2024
    ipo            (h - 1/(2b))^2                              Azar et al. 2023
    hinge          max(0, 1 - b h)                             SLiC-HF on log ratios (Liu et al. 2023, RSO)
    sigmoid_norm   -log s(b (r_c/|c| - r_r/|r|))               Tulu 3
    apo_zero       1 - s(b r_c) + s(b r_r)                     D'Oosterlinck et al. 2024
    llama3         sigmoid on content_only, NLL term 0.2       Llama 3
    simpo          -log s(b (m_c - m_r) - gamma)               no reference
    orpo           NLL - b log s(log odds_c - log odds_r)      no reference
    kto            w (1 - s(+-b (r - z0)))                     unpaired

Every paired loss takes `sft_coefficient`: the chosen answer's mean negative log-likelihood beside it (Pang et al.
2024). To add one: write the class and name it in `PreferenceLoss`; settings, help and tests follow that union. Planning
reads these classes, so torch is imported by the functions that compute.

Legend: P pairs, N rated answers.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.algo.output import LossOutput

CERTAIN = -1e-6  # mean log-prob nearest to 0 whose odds are taken: those of a certain answer are infinite
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below"}  # as pydantic names them, and as messages do


def hyperparameter(default: Any, help: str, **bounds: float) -> Any:
    """A field of a loss. `bounds` (gt, ge, lt) are checked when a loss is made, and by settings."""
    return field(default=default, metadata={"help": help, "bounds": bounds})


# --------------------------------------------------------------------------------------------------- what goes in


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of the chosen and the rejected answer of each pair, summed (not averaged) over tokens.

    policy_chosen, policy_rejected          [P] with gradient
    reference_chosen, reference_rejected    [P], None where the loss needs no reference
    length_chosen, length_rejected          [P] tokens that the sums run over, end of turn included unless content_only
    nll_chosen                              [P] mean negative log-likelihood of all tokens of the chosen answer, control
                                            tokens included, nats; None where the loss has no such term
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    length_chosen: Tensor
    length_rejected: Tensor
    nll_chosen: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi(y|x) - log ref(y|x) of both [P], float32. ValueError without a reference."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss compares with a reference: PairLogps holds no reference log-probs")
        chosen = self.policy_chosen.float() - self.reference_chosen.detach().float()
        rejected = self.policy_rejected.float() - self.reference_rejected.detach().float()
        return chosen, rejected

    def by_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Both [P] divided by their answers' lengths; an answer without tokens gives its sum, 0."""
        return chosen.float() / self.length_chosen.clamp(min=1), rejected.float() / self.length_rejected.clamp(min=1)


@dataclass(frozen=True)
class UnpairedLogps:
    """Log-probs of single answers, summed over tokens, and how each was rated.

    policy            [N] with gradient
    reference         [N]
    desirable         [N] bool
    reference_point   KTO's z0 of the whole optimiser step, nats: see `reference_point`
    """

    policy: Tensor
    reference: Tensor
    desirable: Tensor
    reference_point: float


# ------------------------------------------------------------------------------------------------- paired losses


class Loss:
    """What all preference losses share."""

    name: ClassVar[str]
    paired: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    content_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            for bound, limit in f.metadata["bounds"].items():
                if not {"gt": value > limit, "ge": value >= limit, "lt": value < limit}[bound]:
                    raise ValueError(f"{f.name} must be {BOUNDS[bound]} {limit:g}, not {value}")

    def start(self, figures: Mapping[str, float]) -> float | None:
        """The mean loss, without its NLL term, where policy and reference agree; None where it is not known.

        `figures` are the means of this loss's metrics over the records in question.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class PairLoss(Loss):
    """A loss that compares two answers to one prompt: a subclass writes `compare`."""

    sft_coefficient: float = hyperparameter(
        0.0, "Weight of the chosen answer's mean negative log-likelihood (nats a token) beside the loss.", ge=0
    )

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, implicit reward of the chosen, implicit reward of the rejected answer, all [P]."""
        raise NotImplementedError

    def __call__(self, logps: PairLogps) -> LossOutput:
        """Loss [P] and the sums behind loss, rewards, margin and accuracy.

        With an NLL term `loss` is the comparison's alone, and `preference_loss` and `sft_nll` are both terms.
        """
        from pipeline.algo.output import LossOutput, agreement, sums

        losses, chosen, rejected = self.compare(logps)
        margins = chosen - rejected
        metrics = {
            "loss": sums(losses),
            "reward_chosen": sums(chosen),
            "reward_rejected": sums(rejected),
            "margin": sums(margins),
            "accuracy": agreement(margins),
            "logp_chosen": sums(logps.policy_chosen),
            "logp_rejected": sums(logps.policy_rejected),
        }
        if not self.sft_coefficient:
            return LossOutput(losses, metrics)
        if logps.nll_chosen is None:
            raise ValueError(
                f"{self.name} with sft_coefficient {self.sft_coefficient:g}: PairLogps holds no nll_chosen"
            )
        metrics |= {"preference_loss": metrics["loss"], "sft_nll": sums(logps.nll_chosen)}
        return LossOutput(losses + self.sft_coefficient * logps.nll_chosen.float(), metrics)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(PairLoss):
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing as in Mitchell's note on conservative DPO.

    loss = -(1 - e) log s(beta h) - e log s(-beta h)          e = label_smoothing

    Rewards are beta * log ratio (eq. 5). With policy == reference the loss is exactly ln 2 for every beta and e.
    """

    name: ClassVar[str] = "sigmoid"

    beta: float = hyperparameter(0.1, "Strength of the pull to the reference.", gt=0)
    label_smoothing: float = hyperparameter(0.0, "Assumed share of flipped labels (conservative DPO).", ge=0, lt=0.5)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.log_ratios())
        e = self.label_smoothing
        return (1 - e) * _logistic(chosen - rejected) + e * _logistic(rejected - chosen), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class Robust(PairLoss):
    """Provably robust DPO (Chowdhury et al. 2024): the expected loss is that of unflipped labels.

    loss = (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e)          e = label_smoothing

    It has no lower bound: a pair that contradicts the policy strongly may count below 0.
    """

    name: ClassVar[str] = "robust"

    beta: float = hyperparameter(0.1, "Strength of the pull to the reference.", gt=0)
    label_smoothing: float = hyperparameter(0.1, "Known share of flipped labels.", ge=0, lt=0.5)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.log_ratios())
        e = self.label_smoothing
        clean, flipped = _logistic(chosen - rejected), _logistic(rejected - chosen)
        return ((1 - e) * clean - e * flipped) / (1 - 2 * e), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class Ipo(PairLoss):
    """IPO (Azar et al. 2023, eq. 17): the log ratios' difference is drawn to 1/(2 beta), and not beyond.

    loss = (h - 1/(2 beta))^2          beta is the paper's tau

    As printed, h compares sums over tokens: the target is 1/(2 beta) nats an answer. TRL divides each log ratio by its
    answer's length, which it reports to be how the authors' experiments were run: with `length_normalised` the target
    is 1/(2 beta) nats a token, so the same beta asks for far more.
    """

    name: ClassVar[str] = "ipo"

    beta: float = hyperparameter(0.1, "Regularisation (tau): the log ratios are to differ by 1 / (2 beta).", gt=0)
    length_normalised: bool = hyperparameter(
        False, "Compare log ratios a token (TRL, IPO's experiments) and not those of whole answers (eq. 17)."
    )

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = logps.log_ratios()
        if self.length_normalised:
            chosen, rejected = logps.by_token(chosen, rejected)
        return (chosen - rejected - 1 / (2 * self.beta)).square(), self.beta * chosen, self.beta * rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return 1 / (4 * self.beta**2)


@dataclass(frozen=True, kw_only=True)
class Hinge(PairLoss):
    """SLiC-HF's hinge (Zhao et al. 2023) on log ratios instead of log-probs, as in RSO (Liu et al. 2023).

    loss = max(0, 1 - beta h): beta is the reciprocal of the margin, beyond which a pair has no gradient
    """

    name: ClassVar[str] = "hinge"

    beta: float = hyperparameter(0.1, "Reciprocal of the margin (nats an answer) that a pair should reach.", gt=0)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.log_ratios())
        return (1 - (chosen - rejected)).relu(), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class SigmoidNorm(PairLoss):
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3): log ratios a token.

    loss = -log s(beta (r_c / |c| - r_r / |r|))
    """

    name: ClassVar[str] = "sigmoid_norm"

    beta: float = hyperparameter(
        5.0, "Strength of the pull to the reference, on log ratios a token (5 in Tulu 3).", gt=0
    )

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.by_token(*logps.log_ratios()))
        return _logistic(chosen - rejected), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class ApoZero(PairLoss):
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen up, rejected down, each by itself.

    loss = 1 - s(beta r_c) + s(beta r_r); for data whose chosen answers are better than the policy's own
    """

    name: ClassVar[str] = "apo_zero"

    beta: float = hyperparameter(0.1, "Strength of the pull to the reference.", gt=0)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.log_ratios())
        return (-chosen).sigmoid() + rejected.sigmoid(), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3(PairLoss):
    """DPO as Llama 3 was trained with it (Llama team 2024, section 4.1.4): two changes for stability.

    Control tokens, which chosen and rejected answers share, are left out of both sums; the chosen answer's NLL stands
    beside the loss with weight 0.2. That term keeps the control tokens, since it is there to keep the format.
    """

    name: ClassVar[str] = "llama3"
    content_only: ClassVar[bool] = True

    sft_coefficient: float = hyperparameter(
        0.2, "Weight of the chosen answer's mean negative log-likelihood (nats a token) beside the loss.", ge=0
    )
    beta: float = hyperparameter(0.1, "Strength of the pull to the reference.", gt=0)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * r for r in logps.log_ratios())
        return _logistic(chosen - rejected), chosen, rejected

    def start(self, figures: Mapping[str, float]) -> float | None:
        return math.log(2)


@dataclass(frozen=True, kw_only=True)
class SimPo(PairLoss):
    """SimPO (Meng et al. 2024, eq. 6): mean log-probs themselves are the rewards, at least gamma apart.

    loss = -log s(beta m_c - beta m_r - gamma)
    """

    name: ClassVar[str] = "simpo"
    needs_reference: ClassVar[bool] = False

    beta: float = hyperparameter(2.0, "Scale of the reward, beta times the mean log-prob a token.", gt=0)
    gamma: float = hyperparameter(1.0, "Margin that the two rewards should have.", ge=0)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = (self.beta * m for m in logps.by_token(logps.policy_chosen, logps.policy_rejected))
        return _logistic(chosen - rejected - self.gamma), chosen, rejected


@dataclass(frozen=True, kw_only=True)
class Orpo(PairLoss):
    """ORPO (Hong et al. 2024, eq. 6 and 7): supervised training on the chosen answer and an odds ratio, in one stage.

    loss = sft_coefficient * NLL(c) - beta log s(log odds_c - log odds_r),   odds = p / (1 - p),   p = exp(m)

    The paper's lambda is beta here as in TRL, and its NLL has weight 1. NLL is that of the answer, each answer the same
    weight; TRL averages over all tokens of prompts and answers of a batch.
    """

    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False

    sft_coefficient: float = hyperparameter(
        1.0, "Weight of the chosen answer's mean negative log-likelihood (nats a token): 1 in the paper.", ge=0
    )
    beta: float = hyperparameter(0.1, "Weight of the odds-ratio term (lambda in the paper).", gt=0)

    def compare(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        chosen, rejected = logps.by_token(logps.policy_chosen, logps.policy_rejected)
        odds = _log_odds(chosen) - _log_odds(rejected)
        return self.beta * _logistic(odds), self.beta * chosen, self.beta * rejected


# ------------------------------------------------------------------------------------------------ unpaired losses


@dataclass(frozen=True, kw_only=True)
class Kto(Loss):
    """KTO (Ethayarajh et al. 2024, section 4): each answer against a reference point, with its own weight.

    loss = w_d (1 - s(beta (r - z0)))   desirable            loss = w_u (1 - s(beta (z0 - r)))   undesirable

    z0 estimates KL(pi || ref) and carries no gradient. The paper asks for w_d n_d / (w_u n_u) between 1 and 4/3.
    """

    name: ClassVar[str] = "kto"
    paired: ClassVar[bool] = False

    beta: float = hyperparameter(0.1, "Strength of the pull to the reference.", gt=0)
    desirable_weight: float = hyperparameter(1.0, "What a desirable answer counts (lambda_D).", gt=0)
    undesirable_weight: float = hyperparameter(1.0, "What an undesirable answer counts (lambda_U).", gt=0)

    def __call__(self, logps: UnpairedLogps) -> LossOutput:
        """Loss [N]; rewards by rating; accuracy, how often an answer stands on its own side of the reference point."""
        import torch

        from pipeline.algo.output import LossOutput, agreement, sums

        ratio = logps.policy.float() - logps.reference.detach().float()
        desirable = logps.desirable.bool()
        above = ratio - logps.reference_point
        gain = torch.where(desirable, above, -above)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        losses = weight * (-self.beta * gain).sigmoid()
        metrics = {
            "loss": sums(losses),
            "reward_desirable": sums(self.beta * ratio, desirable),
            "reward_undesirable": sums(self.beta * ratio, ~desirable),
            "accuracy": agreement(gain),
            "desirable": sums(desirable.float()),
            "logp_desirable": sums(logps.policy, desirable),
            "logp_undesirable": sums(logps.policy, ~desirable),
        }
        return LossOutput(losses, metrics)

    def start(self, figures: Mapping[str, float]) -> float | None:
        share = figures["desirable"]
        return 0.5 * (share * self.desirable_weight + (1 - share) * self.undesirable_weight)

    def balance(self, desirable: int, undesirable: int) -> float:
        """w_d n_d / (w_u n_u); inf without undesirable answers."""
        against = self.undesirable_weight * undesirable
        return self.desirable_weight * desirable / against if against else math.inf


def reference_point(mean_log_ratio: float) -> float:
    """KTO's z0: the mean log ratio of prompts with answers to other prompts, and at least 0 (section 4).

    The mean is one over all answers of an optimiser step, on all ranks; NaN stays NaN.
    """
    return 0.0 if mean_log_ratio <= 0 else mean_log_ratio


# ------------------------------------------------------------------------------------------------------- the parts


def _logistic(x: Tensor) -> Tensor:
    """-log s(x), stable at both ends."""
    import torch.nn.functional as F

    return -F.logsigmoid(x)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    logp = logp.clamp(max=CERTAIN)
    return logp - (-logp.expm1()).log()


PreferenceLoss = Sigmoid | Robust | Ipo | Hinge | SigmoidNorm | ApoZero | Llama3 | SimPo | Orpo | Kto

LOSSES: dict[str, type[PreferenceLoss]] = {c.name: c for c in typing.get_args(PreferenceLoss)}


def hyperparameters(name: str) -> list[str]:
    """What the loss of that name can be given, in alphabetical order."""
    return sorted(f.name for f in fields(LOSSES[name]))


def make_loss(name: str, **given: Any) -> PreferenceLoss:
    """The loss of that name. ValueError for an unknown name or hyperparameter, or a value out of range."""
    if name not in LOSSES:
        raise ValueError(f"no preference loss named {name!r}; there are: {', '.join(sorted(LOSSES))}")
    known = hyperparameters(name)
    unknown = set(given) - set(known)
    if unknown:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; it has: {', '.join(known)}")
    return LOSSES[name](**given)
