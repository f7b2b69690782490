"""From scores to advantages: shaped rewards, GAE, whitening.

Legend: B responses, R their longest length, N responses of a flat batch, T its tokens.
The padded functions are the mathematics; the ragged ones lay contiguous runs [start, start + length) of a
flat batch out as [N, R], call them and put the results back, 0 everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.algo.output import keep


def finish_scores(scores_N: Tensor, stopped_N: Tensor, *, score: float | None = None, penalty: float = 0.0) -> Tensor:
    """Scores of responses, those that did not end by themselves put right.

    score     replaces the score of an unfinished response (-1 in Huang et al. 2024, "The N+ implementation
              details of RLHF with PPO")
    penalty   is otherwise taken off it
    """
    unfinished = torch.full_like(scores_N, score) if score is not None else scores_N - penalty
    return torch.where(stopped_N.bool(), scores_N, unfinished)


def last_token(mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] of the last real token (0 where there is none) and whether there is one [B]."""
    mask = mask_BR.bool()
    index = torch.arange(mask.shape[1], device=mask.device)
    return (mask * index).argmax(dim=1), mask.any(dim=1)


def shaped_rewards(kl_BR: Tensor, scores_B: Tensor, mask_BR: Tensor, beta: float) -> Tensor:
    """-beta * kl by token, the score added at the last real token [B, R] (Ouyang et al. 2022, section 3.5).

    A response without real tokens gets nothing.
    """
    rewards = -beta * keep(kl_BR, mask_BR)
    last_B, any_B = last_token(mask_BR)
    bonus = keep(scores_B, any_B).to(rewards.dtype)
    return rewards.scatter_add(1, last_B[:, None], bonus[:, None])


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R] (Schulman et al. 2016, eq. 16), 0 where masked, without gradient.

    delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1};   returns = A + V

    values_BR    value of the state *before* token t
    mask_BR      real tokens; masked ones, at the end or in the middle (tool output), are stepped over: the
                 next real token follows the previous one directly
    bootstrap_B  value of the state after the last token; None is 0, a response being an episode that ends.
                 Give the critic's value only where a response was cut off and is meant to go on.
    """
    with torch.no_grad():
        rewards, values, mask = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR), mask_BR.bool()
        columns = [x.T.contiguous().unbind(0) for x in (rewards, values, mask)]
        next_value = torch.zeros_like(values[:, 0]) if bootstrap_B is None else bootstrap_B.to(values.dtype)
        next_advantage = torch.zeros_like(next_value)
        backwards = []
        for reward, value, real in zip(*(reversed(c) for c in columns), strict=True):
            advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
            next_advantage = torch.where(real, advantage, next_advantage)
            next_value = torch.where(real, value, next_value)
            backwards.append(advantage)
        advantages = keep(torch.stack(backwards[::-1], dim=1), mask)
        return advantages, advantages + values


def to_padded(x_T: Tensor, start_N: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of a flat batch laid out as [N, R], 0 beyond their length, and the mask [N, R]."""
    index, mask = _places(start_N, length_N)
    if x_T.numel() == 0:
        return x_T.new_zeros(index.shape), mask
    return keep(x_T[index.clamp(max=x_T.numel() - 1)], mask), mask


def to_flat(x_NR: Tensor, start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """Inverse of `to_padded`: [size], 0 outside the runs."""
    index, mask = _places(start_N, length_N)
    flat = x_NR.new_zeros(size)
    flat[index[mask]] = x_NR[mask]
    return flat


def _places(start_N: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor]:
    width = max(int(length_N.max()) if length_N.numel() else 0, 1)  # never [N, 0]
    offsets = torch.arange(width, device=start_N.device)
    return start_N[:, None] + offsets, offsets < length_N[:, None]


def shaped_rewards_ragged(kl_T: Tensor, scores_N: Tensor, start_N: Tensor, length_N: Tensor, beta: float) -> Tensor:
    """`shaped_rewards` on runs of a flat batch -> [T]."""
    kl_NR, mask = to_padded(kl_T, start_N, length_N)
    return to_flat(shaped_rewards(kl_NR, scores_N, mask, beta), start_N, length_N, kl_T.numel())


def gae_ragged(
    rewards_T: Tensor,
    values_T: Tensor,
    start_N: Tensor,
    length_N: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_T: Tensor | None = None,
    bootstrap_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gae` on runs of a flat batch -> advantages, returns [T]. `mask_T` leaves out tokens of the runs."""
    rewards, mask = to_padded(rewards_T, start_N, length_N)
    values, _ = to_padded(values_T, start_N, length_N)
    if mask_T is not None:
        mask = to_padded(mask_T.float(), start_N, length_N)[0] > 0
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap_N)
    size = rewards_T.numel()
    return to_flat(advantages, start_N, length_N, size), to_flat(returns, start_N, length_N, size)


def returns_to_go_ragged(
    rewards_T: Tensor, start_N: Tensor, length_N: Tensor, *, gamma: float = 1.0, mask_T: Tensor | None = None
) -> Tensor:
    """`returns_to_go` on runs of a flat batch -> [T]."""
    return gae_ragged(rewards_T, torch.zeros_like(rewards_T), start_N, length_N, gamma=gamma, lam=1.0, mask_T=mask_T)[0]


def spread(x_N: Tensor, start_N: Tensor, length_N: Tensor, size: int) -> Tensor:
    """Each response's number at all of its tokens -> [size], 0 elsewhere."""
    width = max(int(length_N.max()) if length_N.numel() else 0, 1)
    return to_flat(x_N[:, None].expand(-1, width), start_N, length_N, size)


def returns_to_go(rewards_BR: Tensor, mask_BR: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of this and all later rewards [B, R], 0 where masked: GAE without a critic, lambda 1."""
    nothing = torch.zeros_like(keep(rewards_BR, mask_BR))
    return gae(rewards_BR, nothing, mask_BR, gamma=gamma, lam=1.0)[0]


def leave_one_out(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """RLOO: each reward less the mean of the others of its group [N] (Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    group_N says which prompt a response answers. A group of one has nothing to compare with: ValueError.
    """
    centred, count = _centred(rewards_N, group_N)
    if bool((count < 2).any()):
        raise ValueError("leave-one-out needs at least two responses to every prompt")
    return _narrow(centred * count / (count - 1), rewards_N)


def group_relative(rewards_N: Tensor, group_N: Tensor, *, divide: bool = True, epsilon: float = 1e-4) -> Tensor:
    """GRPO: each reward less its group's mean, over the group's deviation [N] (Shao et al. 2024, section 4.1.2).

    The deviation is the unbiased one with epsilon added, as in TRL. `divide=False` leaves the division out, which
    weighs easy and hard prompts alike (Dr. GRPO, Liu et al. 2025). ValueError for a group of one.
    """
    centred, count = _centred(rewards_N, group_N)
    if bool((count < 2).any()):
        raise ValueError("group-relative advantages need at least two responses to every prompt")
    if not divide:
        return _narrow(centred, rewards_N)
    square = centred.new_zeros(int(group_N.max()) + 1).index_add(0, group_N, centred.square())[group_N]
    return _narrow(centred / ((square / (count - 1)).sqrt() + epsilon), rewards_N)


def _centred(rewards_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each reward less its group's mean, and the group's size, [N] each, float64: in float32 seven rewards of 100,000.1
    differ from their mean by 0.008, which GRPO would divide by its epsilon."""
    rewards = rewards_N.detach().double()
    zeros = rewards.new_zeros(int(group_N.max()) + 1 if group_N.numel() else 0)
    total = zeros.index_add(0, group_N, rewards)
    count = zeros.index_add(0, group_N, torch.ones_like(rewards))
    return rewards - (total / count)[group_N], count[group_N]


def _narrow(found_N: Tensor, like_N: Tensor) -> Tensor:
    return found_N.to(torch.promote_types(like_N.dtype, torch.float32))


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[sum, sum of squares, count] of the unmasked items, float64: add over micro-batches and ranks."""
    kept = keep(x.detach(), mask).double()
    return torch.stack([kept.sum(), kept.square().sum(), mask.bool().sum().double()])


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    epsilon: float = 1e-8,
    totals: Tensor | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the unmasked items, 0 where masked, without gradient.

    The variance is the biased one (divided by n) by default, as in lm-human-preferences; `unbiased` divides
    by n - 1, as TRL does. `shift_mean=False` keeps the mean (for rewards). `totals` is the sum of `moments`
    over all ranks: every rank then gets what one process with all the data would get.
    """
    with torch.no_grad():
        total, square, count = (moments(x, mask) if totals is None else totals).unbind(0)
        mean = total / count.clamp(min=1)
        variance = (square - total * mean).clamp(min=0) / (count - int(unbiased)).clamp(min=1)
        kept = keep(x, mask)
        white = (kept.double() - mean) * torch.rsqrt(variance + epsilon)
        return keep(white if shift_mean else white + mean, mask).to(kept.dtype)
