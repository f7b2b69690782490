"""Log-probs of chosen tokens against a plain loop, in chunks, in bfloat16, with temperature and entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.llama import kernel
from pipeline.llama.logprobs import chosen_logprobs, token_kl, token_logprobs
from tests.small import same


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


# --- the compiled log-probs -----------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="no C compiler when the package was installed")


def in_float64(logits: torch.Tensor, ids: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor | None], temperature):
    leaf = logits.double().requires_grad_()
    logp = torch.log_softmax(leaf / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    own = logp.gather(1, ids[:, None]).squeeze(1)
    loss = (own * weights[0]).sum() + (0.0 if weights[1] is None else (entropy * weights[1]).sum())
    loss.backward()
    return own.detach(), entropy.detach(), leaf.grad


def results(logits: torch.Tensor, ids: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor | None], **settings):
    """Log-probs, entropies and the gradient of their weighted sum."""
    leaf = logits.clone().requires_grad_()
    logp, entropy = chosen_logprobs(leaf, ids, entropy=True, **settings)
    loss = (logp * weights[0]).sum() + (0.0 if weights[1] is None else (entropy * weights[1]).sum())
    loss.backward()
    return logp.detach(), entropy.detach(), leaf.grad


@needs_kernel
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_log_probs_are_the_formula(dtype, bound, with_entropy, temperature):
    """Scaled logits reach 50, whose last place in float32 is 4e-6; a gradient in bfloat16 is rounded to it, up to 3."""
    draw = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(37, 48, generator=draw)).to(dtype)
    ids = torch.randint(0, 48, (37,), generator=draw)
    weights = torch.randn(37, generator=draw), torch.randn(37, generator=draw) if with_entropy else None
    found = results(logits, ids, weights, temperature=temperature)
    expected = in_float64(logits, ids, weights, temperature)
    assert found[2].dtype == dtype
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= bound


@needs_kernel
def test_two_tokens_of_equal_logits_by_hand():
    """16 equal logits: log-prob -ln 16, entropy ln 16, gradient [v = y] - 1/16."""
    logp, entropy, grad = results(torch.full((1, 16), 3.0), torch.tensor([5]), (torch.ones(1), None))
    same(logp, [-2.772588722]), same(entropy, [2.772588722])
    same(grad[0, 5], 15 / 16), same(grad[0, 4], -1 / 16)


@needs_kernel
def test_rows_and_threads_change_no_bit_and_what_is_not_finite_shows():
    draw = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(21, 32, generator=draw), torch.randint(0, 32, (21,), generator=draw)
    logits[3, 4], logits[5, 7] = float("nan"), -float("inf")
    weights = torch.randn(21, generator=draw), torch.randn(21, generator=draw)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(logits, ids, weights))
            alone = results(logits[7:8], ids[7:8], (weights[0][7:8], weights[1][7:8]))
            for one, many in zip(alone, found[-1], strict=True):
                assert torch.equal(one[0], many[7])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)
    logp, entropy, grad = found[0]
    assert logp[3].isnan() and grad[3].isnan().all()
    assert (
        entropy[5].isfinite() and grad[5].isfinite().all() and grad[5, 7] == 0.0
    )  # what cannot be drawn weighs nothing


@needs_kernel
def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(IndexError, match="ids of 2 rows of 16 logits"):
        chosen_logprobs(torch.zeros(2, 16), torch.tensor([0, 16]))
