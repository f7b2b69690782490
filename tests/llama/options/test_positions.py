"""ALiBi's slopes and T5's buckets by hand and against transformers' own, sinusoids by hand, learned positions' end."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.t5.modeling_t5 import T5Attention

from pipeline.flow.errors import UserError
from pipeline.llama.options.positions import Alibi, alibi_slopes, buckets, sinusoids
from tests.small import policy


def test_slopes_by_hand() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]  # Press et al. 2022, section 3
    assert alibi_slopes(16)[:2] == [2**-0.5, 2**-1.0]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(1) == [2**-8]
    bias = Alibi(2)(torch.tensor([[0, -1], [1, 0]]))
    assert bias.tolist() == [[[0.0, -(2**-4)], [-(2**-4), 0.0]], [[0.0, -(2**-8)], [-(2**-8), 0.0]]]


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 12, 16, 20, 32, 71, 112])
def test_slopes_are_those_of_transformers_bloom(heads: int) -> None:
    theirs = _get_alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs, atol=1e-7, rtol=1e-6)


def test_buckets_by_hand() -> None:
    """Of 8 buckets 4 hold one distance each, the others end at 16: 4 * 16^(i/4) / 4^(i/4) = 5.66, 8, 11.3, 16."""
    distance = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 500, -1, -9])
    assert buckets(distance, 8, 16, False).tolist() == [0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7, 0, 0]
    assert buckets(torch.tensor([0, 1, 2, 500, -1, -2, -500]), 8, 16, True).tolist() == [0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 16), (16, 300), (64, 65)])
def test_buckets_are_those_of_transformers_t5(count: int, furthest: int, both_sides: bool) -> None:
    distance = torch.arange(-700, 700)
    theirs = T5Attention._relative_position_bucket(-distance, both_sides, count, furthest)
    assert torch.equal(buckets(distance, count, furthest, both_sides), theirs)


def test_sinusoids_by_hand() -> None:
    found = sinusoids(torch.tensor([0, 3]), 4)
    expected = [[0.0, 1.0, 0.0, 1.0], [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_the_first_layer_reads_token_and_position(positions: str) -> None:
    model = policy(positions=positions, max_position_embeddings=12).model.model
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    ids, at = torch.tensor([[5, 6, 7]]), torch.tensor([[4, 5, 6]])
    model(input_ids=ids, position_ids=at)
    words = model.embed_tokens.weight[ids]
    added = model.positions.weight[at] if positions == "learned" else sinusoids(at, 32)
    torch.testing.assert_close(seen["x"], words * (1.0 if positions == "learned" else math.sqrt(32)) + added)


def test_learned_positions_end_with_their_table() -> None:
    model = policy(positions="learned", max_position_embeddings=12).model
    assert model(torch.ones(1, 12, dtype=torch.long)).logits.shape[1] == 12
    with pytest.raises(UserError, match="a text of 13 tokens, but the model has learned 12 positions"):
        model(torch.ones(1, 13, dtype=torch.long))


def test_without_positions_a_set_of_earlier_tokens_is_all_that_counts() -> None:
    model = policy(positions="none", num_hidden_layers=1).model
    a, b = (model(torch.tensor([[*order, 9]])).logits[0, -1] for order in ([5, 6, 7], [7, 5, 6]))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    c, d = (policy(num_hidden_layers=1).model(torch.tensor([[*o, 9]])).logits[0, -1] for o in ([5, 6, 7], [7, 5, 6]))
    assert (c - d).abs().max() > 1e-3
