"""Forest attention against each sequence computed alone, on our core and on transformers' own families."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.data.forest import Forest, Segment, build
from pipeline.llama import attention, kernel
from pipeline.llama.attention import forest_inputs, use_forest
from pipeline.llama.modeling import LlamaForCausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": None,
}
FAMILIES = {
    "ours": lambda: LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "ours, biases": lambda: LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=None)),
    "mistral, window 6": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=6)),
}


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def draw(n: int) -> list[int]:
    return torch.randint(0, 97, (n,)).tolist()


def example() -> list[list[Segment]]:
    """No parent, children with different first tokens, empty replies, an empty root, deep trees, one token."""
    torch.manual_seed(1)
    return [
        [Segment(draw(7)), Segment(draw(5), 0), Segment(draw(9), 0), Segment([], 0), Segment(draw(3), 3)],
        [Segment(draw(30))],
        [Segment(draw(1))],
        [Segment([]), Segment(draw(4), 0)],
        [Segment(draw(4)), Segment([], 0), Segment(draw(3), 1), Segment(draw(20), 2), Segment(draw(18), 2)],
        [Segment(draw(12))],
    ]


def alone(model: nn.Module, groups: list[list[Segment]]) -> Tensor:
    """Logits [T, V] with every segment's whole path computed by itself as an ordinary sequence.

    For a model that reads prompts as a whole, a root that others continue is one.
    """
    logits = []
    for group in groups:
        paths: list[list[int]] = []
        prompt = torch.tensor([len(group[0].ids) if len(group) > 1 else 0])
        whole = {"prefix_lengths": prompt} if getattr(model.config, "prefix_attention", False) else {}
        for segment in group:
            path = (paths[segment.parent] if segment.parent >= 0 else []) + list(segment.ids)
            paths.append(path)
            if segment.ids:
                logits.append(model(torch.tensor([path]), use_cache=False, **whole).logits[0, -len(segment.ids) :])
    return torch.cat(logits)


def grouped(groups: list[list[Segment]]) -> Forest:
    """A forest that PyTorch's products compute."""
    forest = build(groups)
    forest.cache["backend"] = "grouped"
    return forest


def on_forest(model: nn.Module, forest: Forest) -> Tensor:
    assert use_forest(model)
    return model(**forest_inputs(forest)).logits[0, : len(forest)]


def gradients(model: nn.Module, logits: Tensor, weights: Tensor) -> list[Tensor]:
    model.zero_grad()
    (logits * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("long", [384, 10, 1, None])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_forest_equals_each_sequence_alone(family: str, long: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernel (None), and grouped with all segments in buckets, some, none."""
    if long:
        monkeypatch.setattr(attention, "LONG", long)
    model, groups = make(family), example()
    expected = alone(model, groups)
    weights = torch.randn_like(expected)
    wanted = gradients(model, expected, weights)
    forest = grouped(groups) if long else build(groups)
    found = on_forest(model, forest)
    assert (found - expected).abs().max() <= 1e-5
    for (name, _), a, b in zip(model.named_parameters(), gradients(model, found, weights), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name
    if long is None:
        assert ("kernel" in forest.cache) == (kernel.library() is not None)
        return
    longs = len(attention.plan(forest, getattr(model.config, "sliding_window", None)).longs)
    assert (longs == 0) == (long == 384)


def test_dense_reference_equals_the_grouped_computation() -> None:
    model, groups = make("ours"), example()
    found = on_forest(model, grouped(groups))
    dense = build(groups)
    dense.cache["backend"] = "dense"
    assert (on_forest(model, dense) - found).abs().max() <= 1e-5
    assert ("attention", None) not in dense.cache
    mask = attention.dense_mask(build([[Segment([1, 2]), Segment([3], 0), Segment([4], 0)]]))
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_random_trees_equal_each_sequence_alone() -> None:
    rng = random.Random(0)
    model = make("ours")
    for _ in range(10):
        groups = []
        for _ in range(rng.randint(1, 4)):
            group = [Segment(draw(rng.randint(0, 20)))]
            for i in range(rng.randint(0, 6)):
                group.append(Segment(draw(rng.choice([0, 1, 3, 15])), rng.randint(-1, i)))
            groups.append(group)
        if sum(len(s.ids) for g in groups for s in g):
            for forest in (build(groups), grouped(groups)):
                assert (on_forest(model, forest) - alone(model, groups)).abs().max() <= 1e-5


@pytest.mark.parametrize("long", [384, 10, None])
def test_a_token_changes_nothing_outside_its_descendants(long: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        monkeypatch.setattr(attention, "LONG", long)
    model = make("ours")
    groups = example()
    lay_out = grouped if long else build
    forest = lay_out(groups)
    with torch.no_grad():
        before = on_forest(model, forest)
        for number, (segment, offset) in {"parent": (0, 3), "child": (1, 0), "document": (5, 29)}.items():
            ids = forest.ids_T.clone()
            at = int(forest.start_S[segment]) + offset
            ids[at] = (ids[at] + 1) % 97
            changed = lay_out(groups)
            changed.ids_T[:] = ids
            moved = (on_forest(model, changed) - before).abs().amax(-1)
            sees = attention.dense_mask(forest)[:, at]
            assert (moved[~sees] == 0.0).all(), number
            assert (moved[sees] > 0).all(), number


def test_gradient_checkpointing_on_a_forest() -> None:
    model, forest = make("ours").train(), build(example())
    weights = torch.randn(len(forest), 97)
    plain = gradients(model, on_forest(model, forest), weights)
    model.gradient_checkpointing_enable()
    again = gradients(model, on_forest(model, forest), weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_wrapped_projections_give_the_same_as_the_joined_product() -> None:
    """Adapters and sharded weights take the layers' own calls instead of the stacked weights."""
    model, forest = make("ours, biases"), build(example())
    weights = torch.randn(len(forest), 97)
    joined = on_forest(model, forest)
    wanted = gradients(model, joined, weights)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    called = on_forest(model, forest)
    assert (called - joined).abs().max() <= 1e-5
    for a, b in zip(gradients(model, called, weights), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("family", ["ours", "qwen2"])
def test_bfloat16_autocast_stays_near_float32(family: str) -> None:
    model, forest = make(family), build(example())
    exact = on_forest(model, forest)
    with torch.autocast("cpu", torch.bfloat16):
        rough = on_forest(model, forest).float()
    assert 0 < (rough - exact).abs().max() <= 0.03 * exact.abs().max()
    rough.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_without_a_forest_it_is_sdpa() -> None:
    model = make("ours")
    ids = torch.randint(0, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain = model(ids, attention_mask=mask).logits
    use_forest(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 13)


def test_untried_families_and_unknown_arguments_are_refused() -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    )
    assert not use_forest(gpt2)
    x = torch.zeros(1, 2, 3, 4)
    forest = build([[Segment([1, 2, 3])]])
    with pytest.raises(ValueError, match="softcap"):
        attention.forest_attention(gpt2, x, x, x, None, forest=forest, softcap=5.0)
    with pytest.raises(ValueError, match="dropout"):
        attention.forest_attention(gpt2, x, x, x, None, forest=forest, dropout=0.1)


def test_segments_of_similar_size_are_computed_together() -> None:
    forest = build([[Segment([0] * n)] for n in (20, 21, 22, 23, 200, 201)])
    sizes = sorted((b.members, b.queries, b.keys) for b in attention.plan(forest).buckets)
    assert sizes == [(2, 208, 208), (4, 24, 24)]  # lengths in steps of 8
    assert attention.plan(forest) is attention.plan(forest)


def test_sizes_are_rounded_up_to_few() -> None:
    assert [attention._rounded(n) for n in range(1, 13)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12]
    forest = build([[Segment([5, 6]), Segment([7] * 9, parent=0)], [Segment([8] * 3)]])
    inputs = forest_inputs(forest)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 64)
    assert inputs["position_ids"][0, :16].tolist() == [0, 1, *range(2, 11), 0, 1, 2, 0, 0]


def test_filling_gets_no_gradient() -> None:
    """Its id is 0, which no token here has: that row of the embeddings must not move."""
    model = make("ours")
    forest = build([[Segment([5, 6, 7], weights=[1.0] * 3)]])
    with pytest.raises(ValueError, match="use_forest"):
        model(**forest_inputs(forest))
    on_forest(model, forest).square().sum().backward()
    moved = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().squeeze(1)
    assert moved.tolist() == [5, 6, 7]
