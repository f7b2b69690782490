"""Log-probs of chosen tokens against a plain loop, in chunks, in bfloat16, with temperature and entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.llama.logprobs import chosen_logprobs, token_kl, token_logprobs


def by_hand(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logp, spread = [], []
    for row, token in zip((logits.double() / temperature).tolist(), ids.tolist(), strict=True):
        total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
        logp.append(row[token] - total)
        spread.append(-sum(math.exp(x - total) * (x - total) for x in row))
    return torch.tensor(logp), torch.tensor(spread)


def test_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    for case in range(100):
        logits, ids = 3 * torch.randn(4, 11), torch.randint(0, 11, (4,))
        temperature = (1.0, 0.7)[case % 2]
        logp, spread = chosen_logprobs(logits, ids, temperature=temperature, entropy=True)
        expected, entropy = by_hand(logits, ids, temperature)
        assert (logp - expected).abs().max() <= 1e-5 and (spread - entropy).abs().max() <= 1e-5


def test_numbers_by_hand() -> None:
    uniform = torch.zeros(1, 8)
    logp, spread = chosen_logprobs(uniform, torch.tensor([3]), entropy=True)
    assert abs(float(logp) + math.log(8)) < 1e-6 and abs(float(spread) - math.log(8)) < 1e-6
    two = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4, 1/4; at temperature 1/2 p = 9/10, 1/10
    assert abs(float(chosen_logprobs(two, torch.tensor([1]))[0]) - math.log(0.25)) < 1e-6
    assert abs(float(chosen_logprobs(two, torch.tensor([1]), temperature=0.5)[0]) - math.log(0.1)) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 60, 1])
def test_gradients_equal_autograds(temperature: float, entropy: bool, chunk: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 20)
    hidden = torch.randn(9, 6, requires_grad=True)
    ids = torch.randint(0, 20, (9,))
    w, u = torch.randn(9), torch.randn(9)
    logp, spread, _ = token_logprobs(
        hidden, head, ids, 20, temperature=temperature, entropy=entropy, chunk_elements=chunk
    )
    loss = (logp * w).sum() + ((spread * u).sum() if entropy else 0.0)
    found = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    full = torch.log_softmax(head(hidden) / temperature, -1)
    expected_loss = (full.gather(1, ids[:, None])[:, 0] * w).sum()
    if entropy:
        expected_loss = expected_loss - ((full.exp() * full).sum(-1) * u).sum()
    assert abs(float(loss.detach() - expected_loss.detach())) <= 1e-5
    expected = torch.autograd.grad(expected_loss, [hidden, head.weight, head.bias])
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, expected, strict=True))


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    torch.manual_seed(0)
    logits, ids = (5 * torch.randn(50, 300)).to(torch.bfloat16), torch.randint(0, 300, (50,))
    logp, _ = chosen_logprobs(logits, ids)
    exact = torch.log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0]
    assert logp.dtype == torch.float32 and (logp - exact).abs().max() <= 1e-5


def test_no_more_logits_than_asked_for_at_a_time() -> None:
    seen = []
    head = nn.Linear(4, 10)
    head.register_forward_hook(lambda _, __, out: seen.append(out.shape[0]))
    hidden = torch.randn(25, 4, requires_grad=True)
    token_logprobs(hidden, head, torch.zeros(25, dtype=torch.long), 10, chunk_elements=100)[0].sum().backward()
    assert max(seen) == 10 and sum(seen) == 128  # 25 filled up to 64; forward, and once more in the backward pass


def test_nothing_chosen_still_touches_the_head() -> None:
    head = nn.Linear(4, 10)
    logp, spread, _ = token_logprobs(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.long), 10, entropy=True)
    assert logp.shape == spread.shape == (0,)
    logp.sum().backward()
    assert head.weight.grad is not None and head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("chunk", [1 << 24, 64])
def test_exact_kl_and_its_gradient_whatever_the_chunk(chunk: int) -> None:
    """p = [.7, .2, .1], q = [.5, .3, .2]: KL 0.0851228260, its gradient by the policy's logits [.175945, -.098118,
    -.077827]; none flows to the reference."""
    logits = torch.tensor([[0.7, 0.2, 0.1]] * 40).log().requires_grad_()
    reference = torch.tensor([[0.5, 0.3, 0.2]] * 40).log().requires_grad_()
    same_ = lambda x: x
    kl = token_kl(logits, same_, reference, same_, 3, chunk_elements=chunk)
    assert kl.tolist() == pytest.approx([0.0851228260] * 40, abs=1e-6)
    kl.sum().backward()
    assert logits.grad is not None and reference.grad is None
    assert logits.grad[39].tolist() == pytest.approx([0.175945, -0.098118, -0.077827], abs=1e-5)
    warm = token_kl(logits.detach(), same_, reference.detach(), same_, 3, temperature=1e6)
    assert float(warm.abs().max()) < 1e-6
