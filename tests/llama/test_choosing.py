"""A vocabulary of four with the probabilities .1 .4 .2 .3."""

from __future__ import annotations

import pytest
import torch
import transformers

from pipeline.llama import choosing
from pipeline.llama.choosing import Chooser

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ((0, 1.0), [0.1, 0.4, 0.2, 0.3]),
        ((2, 1.0), [0.0, 4 / 7, 0.0, 3 / 7]),
        ((0, 0.69), [0.0, 4 / 7, 0.0, 3 / 7]),  # .4 + .3 reach it
        ((0, 0.71), [0.0, 4 / 9, 2 / 9, 3 / 9]),
        ((0, 0.01), [0.0, 1.0, 0.0, 0.0]),  # at least one
        ((3, 0.75), [0.0, 4 / 7, 0.0, 3 / 7]),  # of 4/9, 3/9, 2/9: 7/9 reach .75
        ((9, 1.0), [0.1, 0.4, 0.2, 0.3]),
        ((0, 1.0, 0.3), [0.0, 4 / 9, 2 / 9, 3 / 9]),  # .1 is below .3 x .4
        ((0, 1.0, 0.6), [0.0, 4 / 7, 0.0, 3 / 7]),
        ((0, 1.0, 1.0), [0.0, 1.0, 0.0, 0.0]),
        ((0, 0.71, 0.6), [0.0, 4 / 7, 0.0, 3 / 7]),  # of 4/9, 3/9, 2/9
    ],
)
def test_truncation_by_hand(cut, expected):
    probs = torch.softmax(choosing.truncate(LOGITS, *cut), -1)
    torch.testing.assert_close(probs, torch.tensor([expected]))


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (0, 0.8), (20, 0.5)])
def test_truncation_is_that_of_transformers(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(50, 61)
    expected = logits
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(choosing.truncate(logits, top_k, top_p), expected)


def test_inverse_cdf_by_hand():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(6, 1)
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24])
    assert choosing.inverse_cdf(probs, noise).tolist() == [1, 1, 3, 3, 4, 4]


def test_tokens_without_probability_are_never_drawn():
    torch.manual_seed(0)
    logits = torch.randn(4096, 33)
    noise = torch.cat([torch.zeros(1024), torch.full((1024,), 1 - 2.0**-24), torch.rand(2048)])
    ids, logprobs, _ = Chooser(0.7, top_k=3)(logits, noise)
    allowed = logits.topk(3, -1).indices
    assert (ids[:, None] == allowed).any(-1).all()
    assert torch.isfinite(logprobs).all()


def test_logprobs_of_both_distributions():
    """Temperature 2 takes roots of the probabilities; token 1 is a stop token, barred; raw ones stay as they are."""
    early, late = torch.tensor([True]), torch.tensor([False])
    ids, own, raw = Chooser(2.0, stop_ids=[1])(LOGITS, torch.tensor([0.99]), early)
    assert ids.item() == 3
    assert own.exp().item() == pytest.approx(0.3**0.5 / (0.1**0.5 + 0.2**0.5 + 0.3**0.5), abs=1e-6)
    assert raw.exp().item() == pytest.approx(0.3, abs=1e-6)
    greedy = Chooser(0.0, stop_ids=[1])
    for early_N, token, probability in ((early, 3, 0.3), (late, 1, 0.4), (None, 1, 0.4)):
        ids, own, raw = greedy(LOGITS, torch.tensor([0.99]), early_N)
        assert (ids.item(), own.item()) == (token, 0.0)
        assert raw.exp().item() == pytest.approx(probability, abs=1e-6)


def test_the_repetition_penalty_divides_positive_scores_and_multiplies_negative_ones():
    """Logits 1, -1, 2, -2 with tokens 1 and 2 seen, penalty 2: 1, -2, 1, -2."""
    logits, seen = torch.tensor([[1.0, -1.0, 2.0, -2.0]]), torch.tensor([[False, True, True, False]])
    assert choosing.penalise(logits, seen, 2.0).tolist() == [[1.0, -2.0, 1.0, -2.0]]
    _, own, raw = Chooser(repetition_penalty=2.0)(logits, torch.zeros(1), seen_NV=seen)
    assert own.item() == pytest.approx(torch.log_softmax(torch.tensor([1.0, -2.0, 1.0, -2.0]), 0)[0].item())
    assert raw.item() == pytest.approx(torch.log_softmax(logits[0], 0)[0].item())
    ids, _, _ = Chooser(0.0, repetition_penalty=2.0)(logits, torch.zeros(1), seen_NV=seen)
    assert ids.item() == 0  # the lower id of a tie


def test_padding_is_not_seen():
    seen = choosing.seen_tokens(torch.tensor([[3, 1, 0], [2, 4, 4]]), torch.tensor([2, 3]), 6)
    assert seen.nonzero().tolist() == [[0, 1], [0, 3], [1, 2], [1, 4]]


def test_all_options_together_are_those_of_transformers():
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(40, 31), torch.randint(0, 31, (40, 9))
    expected = logits.clone()
    for processor in (
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.95),
        transformers.MinPLogitsWarper(0.02),
    ):
        expected = processor(ids, expected)
    seen = choosing.seen_tokens(ids, torch.full((40,), 9), 31)
    got = Chooser(0.7, 20, 0.95, 0.02, 1.3).scores(logits, seen_NV=seen)
    torch.testing.assert_close(got, expected)
    assert 1 < torch.isfinite(got).sum(-1).float().mean() < 15
