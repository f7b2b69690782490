"""What must be true while PPO runs, checked cheaply; each failure names its likely cause.

In fp32 the tolerances are exact where the computation is the same one, on the same forests: ratio 1 and KL 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.data.forest import Forest
from pipeline.flow.errors import NonFinite, RowFailed

EXACT = {"fp32": 0.0, "bf16": 1e-6}  # nats; the same kernels on the same forests give the same bits on a CPU
# Nats a token, between the sampler's cached decoding and the trainer's forests: two ways to the same number. In bf16
# the rounding of a single unlikely token grows with the logits (0.5 nats among 10,000 tokens at a mean of 0.002, once a
# policy had become sharp), so the mean alone tells another policy from another rounding.
SAMPLER = {"fp32": 1e-3, "bf16": math.inf}
SAMPLER_MEAN = {"fp32": 1e-4, "bf16": 0.05}


@torch.no_grad()
def require_ratio_one(
    actor: Callable[..., Any], forests: Iterable[Forest], want: tuple[str, ...], temperature: float, precision: str
) -> None:
    """Before the first update of an iteration every probability ratio is exactly 1 (1e-6 in bf16)."""
    for forest in forests:
        now = actor(forest, want=want, temperature=temperature)
        off = float((now.logprobs_T - forest.tokens["old_logprobs"]).abs().max())
        if not off <= EXACT[precision]:
            raise RowFailed(
                f"before the first update a token's log ratio is {off:.3g}, not 0: the policy that is trained is not "
                "the one whose old log-probs were taken (dropout active? other weights? another temperature?)"
            )


def require_zero_kl(largest: float, precision: str) -> None:
    """In the first iteration policy and reference are the same: every token's log ratio is exactly 0."""
    if not largest <= EXACT[precision]:
        raise RowFailed(
            f"in the first iteration a token's log ratio to the reference is {largest:.3g}, not 0: the reference is "
            "not the policy that this row starts from (adapter merged or left out? other precision? dropout active?)"
        )


def require_sampler(largest: float, mean: float, precision: str) -> None:
    """The trainer's log-probs of the sampled tokens are the sampler's, at its temperature and truncation."""
    if not (largest <= SAMPLER[precision] and mean <= SAMPLER_MEAN[precision]):
        raise RowFailed(
            f"the trainer gives sampled tokens other log-probs than the sampler did, by {mean:.3g} nats on average and "
            f"{largest:.3g} at most (allowed: {SAMPLER_MEAN[precision]:g} and {SAMPLER[precision]:g}): they are not "
            "the same policy (weights not handed over to the sampler? another temperature or template? dropout active?)"
        )


def require_scores_last(
    rewards_T: Tensor, kl_T: Tensor, scores_N: Tensor, forest: Forest, at: Tensor, beta: float
) -> None:
    """Each answer's score stands on its last real token and on no other, beside the penalty."""
    filled = forest.length_S[at] > 0
    last = forest.last_S[at][filled]
    expected = (-beta * kl_T).to(rewards_T.dtype).index_add(0, last, scores_N[filled].to(rewards_T.dtype))
    # Relative to both: beside a penalty of 1e5 a float32 keeps a score to 0.01.
    if not bool(((rewards_T - expected).abs() <= 1e-6 * (1.0 + expected.abs())).all()):
        raise RowFailed("a score does not stand on the last token of its answer: segments and rewards are out of step")


def require_finite(what: str, values: Tensor, why: str) -> None:
    """NonFinite, before anything is computed from them."""
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFinite(f"{bad} of {values.numel()} {what} are not finite: {why}")


def require_finite_weights(named: Mapping[str, Tensor], saved: str) -> None:
    """One sum a tensor: NaN and infinity survive it."""
    for name, tensor in named.items():
        if not bool(torch.isfinite(tensor.detach().float().sum())):
            raise NonFinite(f"{name} holds values that are not finite; {saved}. Lower train.learning_rate")
