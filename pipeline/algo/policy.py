"""PPO's losses and what is logged beside them (Schulman et al. 2017). Shapes are free: [B, R], [T], anything.

Every function takes a mask of real response tokens, returns 0 elsewhere, and lets nothing masked through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.algo.output import LossOutput, Sums, keep, sums


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> LossOutput:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)) by token: eq. 7, negated to be minimised.

    clip_high    the upper range where it differs from the lower one (DAPO, Yu et al. 2025, eq. 10)
    dual_clip    c > 1: for A < 0 the loss is at most -c A, so that a large ratio cannot blow it up (Ye et al.
                 2020, eq. 5)
    importance   weight of each token's loss, without gradient (see `importance_weights`)

    Metrics: `policy_loss`; `ratio`; `clip_fraction`, tokens where a clipped branch is taken, so that they get
    no gradient; `approx_kl`, k3 of the old policy against the new one, on samples of the old.
    """
    log_ratio = keep(logprobs, mask) - keep(old_logprobs, mask).detach()
    advantages = keep(advantages, mask).detach()
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))
    losses = torch.maximum(plain, clipped)
    at_clip = clipped > plain
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        at_clip = at_clip | (losses > ceiling)
        losses = torch.minimum(losses, ceiling)
    if importance is not None:
        losses = losses * keep(importance, mask).detach()
    metrics = {
        "policy_loss": sums(losses, mask),
        "ratio": sums(ratio, mask),
        "clip_fraction": sums(at_clip.float(), mask),
        "approx_kl": sums(torch.expm1(log_ratio) - log_ratio, mask),
    }
    return LossOutput(losses, metrics)


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float | None = 2.0
) -> tuple[Tensor, dict[str, Sums]]:
    """min(pi_trainer / pi_sampler, cap) by token, without gradient, 0 where masked.

    Corrects for answers drawn from another distribution than the trainer computes: another kernel or precision,
    truncated sampling (truncated importance sampling: Ionides 2008; Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). `cap=None` does not truncate.

    Metrics: `sampler_gap`, the mean absolute difference of the two log-probs in nats; `sampler_weight`, the mean
    weight; `sampler_capped`, the share of tokens at the cap.
    """
    gap = keep(logprobs.detach(), mask) - keep(sampler_logprobs.detach(), mask)
    ratio = gap.exp()
    weight = ratio if cap is None else ratio.clamp(max=cap)
    metrics = {
        "sampler_gap": sums(gap.abs(), mask),
        "sampler_weight": sums(weight, mask),
        "sampler_capped": sums((ratio > weight).float(), mask),
    }
    return keep(weight, mask), metrics


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> LossOutput:
    """0.5 max((v - R)^2, (v_clipped - R)^2) by token, v_clipped within `clip` of the old value.

    As in lm-human-preferences: the larger of the two, and the factor 0.5. `clip=None` does not clip.
    Metrics: `value_loss`; `value_clip_fraction` (only with a clip).
    """
    values, old = keep(values, mask), keep(old_values, mask).detach()
    returns = keep(returns, mask).detach()
    plain = (values - returns).square()
    if clip is None:
        return LossOutput(0.5 * plain, {"value_loss": sums(0.5 * plain, mask)})
    moved = values - old
    # Not old + clamp(moved) throughout: its rounding would count as clipping where nothing is clipped.
    within = torch.where(moved.abs() <= clip, values, old + moved.clamp(-clip, clip))
    clipped = (within - returns).square()
    losses = 0.5 * torch.maximum(plain, clipped)
    metrics = {"value_loss": sums(losses, mask), "value_clip_fraction": sums((clipped > plain).float(), mask)}
    return LossOutput(losses, metrics)


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy in nats of softmax(logits) over the last dimension, [..., V] -> [...], from finite logits."""
    if mask is not None:
        logits = keep(logits, mask[..., None])
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    nats = -(log_p.exp() * log_p).sum(-1)
    return nats if mask is None else keep(nats, mask)


def explained_variance_sums(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """[count, sum R, sum R^2, sum (R - V), sum (R - V)^2], float64: add over micro-batches and ranks."""
    target = keep(returns.detach(), mask).double()
    error = target - keep(values.detach(), mask).double()
    count = mask.bool().sum().double()
    return torch.stack([count, target.sum(), target.square().sum(), error.sum(), error.square().sum()])


def explained_variance(totals: Tensor) -> float | None:
    """1 - Var(R - V) / Var(R) from added sums; 0 is no better than a constant. None where R is constant."""
    count, target, target_square, error, error_square = (float(x) for x in totals)
    if count < 2:
        return None
    variance = target_square / count - (target / count) ** 2
    if variance <= 1e-12 * max(target_square / count, 1e-30):
        return None
    return 1.0 - (error_square / count - (error / count) ** 2) / variance
