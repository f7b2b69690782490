"""What is visible, by hand; first tokens against StreamingLLM's own cache; where a prompt ends in a forest."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama.heads import hidden_states
from pipeline.llama.modeling import _rotate_half_split
from pipeline.llama.options.windows import Causal, Lambda, Prefix, Window, prompt_lengths
from tests.small import policy

AT = torch.arange(6)


def seen(sight: Causal, prompt: int = 0) -> list[str]:
    found = sight.sees(AT[:, None], AT[None], torch.tensor([[prompt]]))
    return ["".join(".x"[v] for v in row) for row in found.int().tolist()]


def test_what_is_visible_by_hand() -> None:
    assert seen(Causal()) == ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"]
    assert seen(Window(2)) == ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "....xx"]
    assert seen(Lambda(2, 1)) == ["x.....", "xx....", "xxx...", "x.xx..", "x..xx.", "x...xx"]
    assert seen(Prefix(), 3) == ["xxx...", "xxx...", "xxx...", "xxxx..", "xxxxx.", "xxxxxx"]
    assert seen(Prefix()) == seen(Causal())


def test_first_tokens_are_never_further_than_a_cache_of_both_is_long() -> None:
    distance = Lambda(2, 1).distance(AT[:, None], AT[None])
    assert distance[:, 0].tolist() == [0, 1, 2, 2, 2, 2]  # a cache of three tokens
    assert torch.equal(distance[:, 1:], (AT[:, None] - AT[None])[:, 1:])


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_first_tokens_are_streaming_llms(positions: str) -> None:
    """One layer: for every query the cache that StreamingLLM would hold, its tokens numbered anew from 0."""
    window, first = 4, 2
    options = {} if positions == "rotary" else {"positions": positions}
    model = policy(0, 0.3, num_hidden_layers=1, sliding_window=window, first_tokens=first, **options).model
    layer, n = model.model.layers[0].self_attn, 13
    x = torch.randn(1, n, 32)
    _, shared = model.model._on_rows(x, torch.arange(n)[None], None, None)
    found, _ = layer(x, **shared)
    plain = policy(0, 0.3, num_hidden_layers=1, **options).model
    plain_rotary, expected = plain.model.rotary, []
    q, k, v = layer.heads_of(x)
    for m in range(n):
        kept = [j for j in range(m + 1) if j < first or j > m - window]
        at = torch.arange(len(kept))
        keys, values = k[0, :, kept].repeat_interleave(2, 0), v[0, :, kept].repeat_interleave(2, 0)
        query = q[0, :, m, None]
        if positions == "rotary":
            cos, sin = (y[0] for y in plain_rotary.cos_sin(at[None], torch.float32))
            keys, query = _rotate_half_split(keys, cos, sin), _rotate_half_split(query, cos[-1:], sin[-1:])
        scores = query @ keys.transpose(1, 2) * layer.scaling
        if positions == "alibi":
            scores = scores - torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(4)])[:, None, None] * (at[-1] - at)
        expected.append((scores.softmax(-1) @ values).reshape(-1))
    torch.testing.assert_close(found[0], layer.o_proj(torch.stack(expected)), atol=1e-5, rtol=1e-5)


def test_distances_stay_short_in_long_texts() -> None:
    """What a query makes of a first token and its window does not depend on how far away it is."""
    model = policy(0, 0.3, num_hidden_layers=1, sliding_window=4, first_tokens=2).model
    head, tail = [5, 6], [7, 8, 9, 10]
    found = [model(torch.tensor([[*head, *[11] * n, *tail]])).logits[0, -1] for n in (1, 40, 300)]
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=0)


def test_where_a_prompt_ends() -> None:
    forest = build(
        [
            [Segment([1, 2, 3]), Segment([4], 0, weights=[1.0]), Segment([5], 1, weights=[1.0])],  # prompt and answers
            [Segment([1, 2, 3, 4], weights=[0.0, 0.0, 1.0, 0.0])],  # a dialogue: up to its first trained token
            [Segment([1, 2, 3])],  # nobody says
            [Segment([]), Segment([4, 5], 0)],  # an answer to nothing
            [Segment([1, 2], weights=[1.0, 1.0])],  # a document
        ]
    )
    assert prompt_lengths(forest).tolist() == [3, 3, 3, 2, 0, 0, 0, 0]


def test_the_prefix_of_a_window_of_text_is_read_in_both_directions() -> None:
    """As pretraining's prefix objective lays a window out: no loss on its beginning, all of which sees all of it."""
    model = policy(prefix_attention=True).model
    weights = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    states = []
    for ids in ([5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 12, 9, 10, 11], [5, 6, 7, 8, 9, 12, 11]):
        states.append(hidden_states(model, build([[Segment(ids, weights=weights)]])))
    prefix, suffix = ((states[0] - other).abs().amax(-1) > 0 for other in states[1:])
    assert prefix.tolist() == [True] * 7  # its last token reaches its first
    assert suffix.tolist() == [False] * 5 + [True] * 2


def test_generating_with_transformers_reads_the_prompt_as_a_whole() -> None:
    model = policy(0, 0.3, prefix_attention=True).model
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        again = model(written[:, :-1], prefix_lengths=torch.tensor([5]), use_cache=False).logits[0, 4:].argmax(-1)
        padded = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11, 12]])
        mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
        both = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        with pytest.raises(UserError, match="use_cache is false"):
            model.generate(ids, max_new_tokens=2, use_cache=False)
    assert torch.equal(again, written[0, 5:])
    assert torch.equal(both[0, 8:], written[0, 5:])


def laid_out(ids: list[int]) -> list[list[Segment]]:
    """A dialogue with two answers, a window of the prefix objective, a comparison."""
    weigh = lambda learnt: [float(i in learnt) for i in range(8)]
    return [
        [Segment(ids[:8], weights=weigh({3, 4, 7}))],
        [Segment(ids[8:16], weights=weigh({5, 6, 7}))],
        [Segment(ids[16:20]), Segment(ids[20:23], 0, weights=[1.0] * 3), Segment(ids[23:26], 0, weights=[1.0] * 3)],
    ]


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_no_token_is_seen_before_it_is_predicted(positions: str) -> None:
    """Another trained token leaves the state that predicts it, and all before, to the bit."""
    options = {} if positions == "rotary" else {"positions": positions}
    model = policy(0, 0.3, prefix_attention=True, **options).model
    ids = torch.randint(4, 90, (26,), generator=torch.Generator().manual_seed(0)).tolist()
    forest = build(laid_out(ids))
    with torch.no_grad():
        before = hidden_states(model, forest)
        for t in range(26):
            other = hidden_states(model, build(laid_out([*ids[:t], ids[t] + 1, *ids[t + 1 :]])))
            moved = (other - before).abs().amax(-1) > 0
            assert moved[t]
            if forest.weights_T[t]:
                assert not moved[: int(forest.predictor_T[t]) + 1].any()


@pytest.mark.parametrize(
    "shape", [{"prefix_attention": True}, {"sliding_window": 3}, {"sliding_window": 3, "first_tokens": 2}], ids=str
)
def test_padded_rows_see_the_same(shape: dict) -> None:
    model, forest = policy(0, 0.3, **shape).model, build(laid_out(list(range(10, 36))))
    with torch.no_grad():
        found = hidden_states(model, forest, padded=True)
        torch.testing.assert_close(found, hidden_states(model, forest, padded=False), atol=1e-5, rtol=1e-5)
