from __future__ import annotations

import math

import pytest
import torch

from pipeline.algo.advantages import (
    finish_scores,
    gae,
    gae_ragged,
    group_relative,
    leave_one_out,
    moments,
    returns_to_go,
    returns_to_go_ragged,
    shaped_rewards,
    shaped_rewards_ragged,
    spread,
    to_flat,
    to_padded,
    whiten,
)

F64 = torch.float64
B_REWARDS, B_VALUES = [0.1, -0.2, 0.05, 1.0], [0.2, 0.1, 0.3, 0.4]


def row(x) -> torch.Tensor:
    return torch.tensor([x], dtype=F64)


CASES = [
    ("gae_A r=[0,0,1] v=[.5,.4,.3] g=1 l=.95", [0, 0, 1], [0.5, 0.4, 0.3], 1.0, 0.95),
    ("gae_B r=[.1,-.2,.05,1] v=[.2,.1,.3,.4] g=.99 l=.95", B_REWARDS, B_VALUES, 0.99, 0.95),
    ("gae_lambda1_is_MC r=[.1,-.2,.05,1] v=same g=1 l=1", B_REWARDS, B_VALUES, 1.0, 1.0),
    ("gae_lambda0_is_TD g=.99 l=0", B_REWARDS, B_VALUES, 0.99, 0.0),
]


@pytest.mark.parametrize("name, rewards, values, gamma, lam", CASES)
def test_worked_gae(oracles, name, rewards, values, gamma, lam):
    advantages, returns = gae(row(rewards), row(values), torch.ones(1, len(rewards)), gamma=gamma, lam=lam)
    assert advantages[0].tolist() == pytest.approx(oracles[name][0], abs=1e-12)
    assert returns[0].tolist() == pytest.approx(oracles[name][1], abs=1e-12)


@pytest.mark.parametrize("poison", [100.0, 1e9, math.nan])
def test_gae_does_not_see_padding(oracles, poison):
    name = next(k for k in oracles if k.startswith("gae_masked_pad (ROLL#447)"))
    mask = torch.tensor([[1, 1, 0]])
    advantages, returns = gae(row([0, 1, poison]), row([0, 0, poison]), mask, gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([*oracles[name][0][:2], 0.0])
    assert returns[0].tolist() == pytest.approx([*oracles[name][1][:2], 0.0])
    wrong, _ = gae(row([0, 1, 0]), row([0, 0, 100]), torch.ones(1, 3), gamma=1.0, lam=0.95)
    assert wrong[0].tolist() == pytest.approx(oracles["gae_masked_pad WRONG(unmasked)"][0])  # what the mask prevents


def test_gae_steps_over_tokens_of_others(oracles):
    """Tool output between two turns: the last own token before it is followed by the first one after it."""
    name = next(k for k in oracles if k.startswith("gae_multi_turn"))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]])
    rewards = row([0, 0, 0.1, 0.1, 0.1, 0, 0, 0.1, 1.0, 0, 0])
    values = row([-37.0, 0.4, 4.0, 5.0, 6.0, math.nan, 0.7, 7.0, 9.0, 0, 0])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    real = mask[0].bool()
    for got, want in ((advantages, oracles[name][0]), (returns, oracles[name][1])):
        assert got[0][real].tolist() == pytest.approx(torch.tensor(want, dtype=F64)[real].tolist(), abs=1e-9)
        assert got[0][~real].tolist() == [0.0] * 6


def test_the_state_after_the_last_token_is_worth_nothing_unless_said():
    rewards, values, mask = row([0.0, 1.0]), row([0.0, 0.0]), torch.ones(1, 2)
    ended, _ = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    cut_off, _ = gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap_B=torch.tensor([4.0]))
    assert ended[0].tolist() == [0.5, 1.0]
    assert cut_off[0].tolist() == [1.5, 3.0]


def test_ragged_equals_padded_one_by_one():
    generator = torch.Generator().manual_seed(0)
    start, length = torch.tensor([3, 12, 9, 20]), torch.tensor([5, 7, 0, 1])
    rewards, values = torch.randn(25, generator=generator), torch.randn(25, generator=generator)
    inside = torch.zeros(25, dtype=torch.bool)
    for s, n in zip(start, length, strict=True):
        inside[s : s + n] = True
    poisoned = [torch.where(inside, x, torch.nan) for x in (rewards, values)]
    advantages, returns = gae_ragged(*poisoned, start, length, gamma=0.9, lam=0.7)
    for s, n in zip(start.tolist(), length.tolist(), strict=True):
        if n:
            a, r = gae(rewards[None, s : s + n], values[None, s : s + n], torch.ones(1, n), gamma=0.9, lam=0.7)
            assert torch.equal(a[0], advantages[s : s + n]) and torch.equal(r[0], returns[s : s + n])
    assert not advantages[~inside].any() and not returns[~inside].any()


def test_ragged_with_tokens_left_out():
    rewards, values = torch.tensor([9.0, 0.0, 7.0, 1.0]), torch.tensor([9.0, 0.0, math.nan, 0.0])
    mask = torch.tensor([False, True, False, True])
    start, length = torch.tensor([1]), torch.tensor([3])
    advantages, _ = gae_ragged(rewards, values, start, length, gamma=1.0, lam=0.5, mask_T=mask)
    assert advantages.tolist() == [0.0, 0.5, 0.0, 1.0]


def test_padding_round_trip_and_empty_batches():
    flat = torch.arange(10.0)
    start, length = torch.tensor([0, 6]), torch.tensor([2, 4])
    padded, mask = to_padded(flat, start, length)
    assert padded.tolist() == [[0, 1, 0, 0], [6, 7, 8, 9]] and mask.sum().item() == 6
    assert to_flat(padded, start, length, 10).tolist() == [0, 1, 0, 0, 0, 0, 6, 7, 8, 9]
    none = torch.zeros(0, dtype=torch.int64)
    assert gae_ragged(torch.zeros(3), torch.zeros(3), none, none)[0].tolist() == [0, 0, 0]
    assert to_padded(torch.zeros(0), torch.tensor([0]), torch.tensor([0]))[1].sum().item() == 0


def test_worked_shaped_rewards(oracles):
    want = oracles["shaped rewards beta .1 score .8"]
    got = shaped_rewards(row(want["kl"]), torch.tensor([0.8], dtype=F64), torch.ones(1, 3), beta=0.1)
    assert got[0].tolist() == pytest.approx(want["rewards"], abs=1e-12)
    assert got.sum().item() == pytest.approx(want["total"]) == pytest.approx(want["check"])


def test_the_score_lands_on_the_last_real_token():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    kl = torch.where(mask.bool(), 0.0, math.nan)
    got = shaped_rewards(kl, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), mask, beta=0.1)
    want = [[0, 0, 1, 0], [0, 0, 0, 2], [3, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    assert got.tolist() == want


def test_shaped_rewards_of_runs():
    kl = torch.tensor([math.nan, 0.2, -0.1, 0.5, math.nan, 1.0])
    got = shaped_rewards_ragged(
        kl, torch.tensor([0.8, 2.0, 9.0]), torch.tensor([1, 5, 6]), torch.tensor([3, 1, 0]), 0.1
    )
    assert got.tolist() == pytest.approx([0, -0.02, 0.01, 0.75, 0, 1.9])


def test_a_response_without_an_end():
    scores, stopped = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert finish_scores(scores, stopped, score=-1.0).tolist() == [2.0, -1.0]
    assert finish_scores(scores, stopped, penalty=0.5).tolist() == [2.0, 1.5]
    assert finish_scores(scores, stopped).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("pad", [100.0, 1e9, math.nan])
def test_worked_whitening(oracles, pad):
    want = oracles["whiten x=[1,2,3,4,(pad 100)]"]
    x, mask = torch.tensor([1, 2, 3, 4, pad], dtype=F64), torch.tensor([1, 1, 1, 1, 0])
    total, square, count = moments(x, mask).tolist()
    assert total / count == want["mean"] and square / count - (total / count) ** 2 == want["var_biased"]
    assert whiten(x, mask).tolist() == pytest.approx([*want["white_biased"], 0.0], abs=1e-9)
    assert whiten(x, mask, unbiased=True).tolist() == pytest.approx([*want["white_unbiased"], 0.0], abs=1e-9)
    kept = whiten(x, mask, shift_mean=False)
    assert kept[:4].mean().item() == pytest.approx(want["mean"]) and kept[4].item() == 0.0


def test_whitening_over_ranks_is_whitening_at_once():
    x = 3.0 + 2.0 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(1000) % 7 != 0
    whole = whiten(x, mask)
    for cuts in ([500], [10, 300, 999]):
        parts = list(zip(x.tensor_split(cuts), mask.tensor_split(cuts), strict=True))
        totals = torch.stack([moments(*p) for p in parts]).sum(0)
        assert torch.allclose(torch.cat([whiten(*p, totals=totals) for p in parts]), whole, atol=1e-6)


def test_whitening_nothing_or_a_constant_is_finite():
    assert whiten(torch.tensor([5.0, 5.0]), torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert whiten(torch.tensor([5.0, 5.0]), torch.tensor([1, 1])).tolist() == [0.0, 0.0]
    assert whiten(torch.tensor([5.0, 9.0]), torch.tensor([1, 0]), unbiased=True).tolist() == [0.0, 0.0]


def test_leave_one_out_by_hand():
    """Rewards 1, 2, 6: the others average 4, 3.5, 1.5."""
    rewards, group = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 3, 3])
    assert leave_one_out(rewards, group).tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0])
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(torch.ones(3), torch.tensor([0, 0, 1]))


def test_group_relative_by_hand():
    """Rewards 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; a group without spread gets 0."""
    rewards, group = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    spread_ = 7**0.5 + 1e-4
    assert group_relative(rewards, group).tolist() == pytest.approx([-2 / spread_, -1 / spread_, 3 / spread_, 0, 0])
    assert group_relative(rewards, group, divide=False).tolist() == pytest.approx([-2, -1, 3, 0, 0])
    with pytest.raises(ValueError, match="at least two"):
        group_relative(torch.ones(1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(("answers", "reward"), [(7, 1e5 + 0.1), (3, 1000.1), (6, 1000.1)])
def test_a_group_of_equal_rewards_has_no_advantage(answers: int, reward: float):
    """However large they are: the rounding of their mean must not be divided by the epsilon beside a spread of 0."""
    rewards, group = torch.full((answers,), reward), torch.zeros(answers, dtype=torch.int64)
    assert group_relative(rewards, group).abs().max() < 1e-6
    assert leave_one_out(rewards, group).abs().max() < 1e-6


def test_returns_to_go_by_hand():
    """Rewards 1, 2, 4 with gamma 1/2: 1 + (2 + 4/2) / 2 = 3, 2 + 2 = 4, 4."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert returns_to_go(rewards, mask, gamma=0.5)[0].tolist() == [3.0, 4.0, 4.0, 0.0]
    flat = returns_to_go_ragged(torch.tensor([7.0, 1.0, 2.0, 4.0]), torch.tensor([1]), torch.tensor([3]), gamma=0.5)
    assert flat.tolist() == [0.0, 3.0, 4.0, 4.0]


def test_a_number_a_response_at_all_of_its_tokens():
    found = spread(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1, 4, 5]), torch.tensor([2, 0, 1]), 7)
    assert found.tolist() == [0, 2, 2, 0, 0, 4, 0]
    assert spread(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2).tolist() == [
        0,
        0,
    ]
