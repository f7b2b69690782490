"""Forests under written masks: parts against the plain formula over all tokens, long segments, exactness, precision."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.forest import Segment, build
from pipeline.llama import attention, decode
from pipeline.llama.adapter_settings import PrefixSettings, PromptSettings
from pipeline.llama.adapters import add_adapter
from pipeline.llama.heads import hidden_states
from pipeline.llama.options.masked import MaskedAttention, parts
from tests.architectures import LAMBDA, LATENT, SIX, T5
from tests.llama.test_attention import example, gradients, on_forest
from tests.llama.test_decode import PROMPTS, padded
from tests.small import policy

OPTIONS = {
    "alibi": {"positions": "alibi", **SIX},
    "t5, prefix": {**T5, "prefix_attention": True},
    "first tokens": LAMBDA,
    "latent": LATENT,
}


@pytest.mark.parametrize("long", [10, 1])
@pytest.mark.parametrize("option", OPTIONS)
def test_parts_are_the_plain_formula(option: str, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some segments computed by themselves, and with all; the tables of T5 get their gradient through masks."""
    monkeypatch.setattr(attention, "LONG", long)
    model, groups = policy(0, 0.2, **OPTIONS[option]).model, example()
    plain, by_parts = build(groups), build(groups)
    plain.cache["backend"] = "dense"
    expected, found = on_forest(model, plain), on_forest(model, by_parts)
    assert (found - expected).abs().max() <= 1e-5 and "parts" not in plain.cache
    assert any(len(p.queries) == 1 and p.there.all() for p in parts(by_parts))
    weights = torch.randn_like(expected)
    wanted = gradients(model, expected, weights)
    for (name, _), a, b in zip(model.named_parameters(), gradients(model, found, weights), wanted, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("option", OPTIONS)
def test_a_token_changes_nothing_that_cannot_see_it(option: str) -> None:
    model, groups = policy(**OPTIONS[option]).model, example()
    forest = build(groups)
    whole = model.config.prefix_attention
    with torch.no_grad():
        before = on_forest(model, forest)
        changed = build(groups)
        changed.ids_T[3] = (changed.ids_T[3] + 1) % 97  # of the first prompt of seven tokens
        moved = (on_forest(model, changed) - before).abs().amax(-1) > 0
    related = attention.dense_mask(forest)[:, 3]
    assert not moved[7 + 5 + 9 + 3 :].any()  # other groups
    assert moved[:3].all() if whole else not moved[:3].any()
    assert not (moved & ~related)[7:].any()


@pytest.mark.parametrize("option", OPTIONS)
def test_without_gradients_the_bits_are_the_same(option: str) -> None:
    """PPO's ratio is exactly 1 before its first update: what samples are scored by is what is trained."""
    model = policy(**OPTIONS[option]).model
    trained = on_forest(model, build(example()))
    with torch.no_grad():
        assert torch.equal(on_forest(model, build(example())), trained)


def test_gradient_checkpointing_carries_the_gradient_of_shared_biases() -> None:
    model, forest = policy(**T5).model.train(), build(example())
    weights = torch.randn(len(forest), model.config.vocab_size)
    plain = gradients(model, on_forest(model, forest), weights)
    model.gradient_checkpointing_enable()
    again = gradients(model, on_forest(model, forest), weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_bfloat16_autocast_stays_near_float32(option: str) -> None:
    model, forest = policy(**OPTIONS[option]).model, build(example())
    exact = on_forest(model, forest)
    with torch.autocast("cpu", torch.bfloat16):
        rough = on_forest(model, forest).float()
    assert 0 < (rough - exact).abs().max() <= 0.05 * exact.abs().max()
    rough.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", OPTIONS)
def test_half_precision_keeps_biases_and_padding_sane(option: str, dtype: torch.dtype) -> None:
    model = policy(**OPTIONS[option]).model
    ids, mask = torch.randint(4, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    forest = build(example())
    with torch.no_grad():
        exact = model(ids, attention_mask=mask).logits[mask > 0], on_forest(model, forest)
        model.to(dtype)
        rough = model(ids, attention_mask=mask).logits[mask > 0], on_forest(model, forest)
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == dtype and (a.float() - b).abs().max() <= 0.05 * b.abs().max()


@pytest.mark.parametrize("option", OPTIONS)
def test_eager_is_sdpa_and_others_are_refused(option: str) -> None:
    model = policy(**OPTIONS[option]).model
    ids, mask = torch.randint(4, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    for implementation in ("eager", "sdpa", "forest"):
        model.set_attn_implementation(implementation)
        found.append(model(ids, attention_mask=mask).logits[mask > 0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], found[2])
    with pytest.raises(ValueError, match="[Ff]lex"):
        model.set_attn_implementation("flex_attention")


@pytest.mark.parametrize(
    ("option", "adapter"),
    [
        ({"positions": "alibi"}, PromptSettings(kind="prompt", tokens=3)),
        (T5, PrefixSettings(kind="prefix", tokens=3)),
        ({"positions": "learned"}, PromptSettings(kind="prompt", tokens=3)),
        (LATENT, PromptSettings(kind="prompt", tokens=3)),
    ],
)
def test_virtual_tokens_stand_before_every_text(option: dict, adapter: PromptSettings) -> None:
    """What a cache computes under them is what padded rows do."""
    model = add_adapter(policy(0, 0.2, **option).model, adapter, 0).eval()
    ids, lengths = padded(PROMPTS)
    forest = build([[Segment([*prompt, 20])] for prompt in PROMPTS])
    with torch.no_grad():
        runner = decode.new_runner(model, decode.new_cache(model, 4, 16))
        found = [runner.prefill(ids, lengths, torch.arange(4)[:, None])]
        found.append(runner.step(torch.full((4,), 20), lengths, 8))
        logits = model.get_base_model().lm_head(hidden_states(model, forest))
    for got, at in zip(found, (forest.last_S - 1, forest.last_S), strict=True):
        torch.testing.assert_close(got, logits[at], atol=1e-5, rtol=1e-5)


def test_weights_of_alibi_by_hand() -> None:
    """float64: softmax(q k / sqrt(d) - slope distance) over the keys up to a query."""
    model = policy(0, 0.3, positions="alibi", num_hidden_layers=1).model
    layer, x, n = model.model.layers[0].self_attn, torch.randn(1, 7, 32), 7
    assert type(layer) is MaskedAttention
    _, shared = model.model._on_rows(x, torch.arange(n)[None], None, None)
    model.set_attn_implementation("eager")
    _, weights = layer(x, **shared)
    q, k = (project(x).detach().double()[0].view(n, -1, 8) for project in (layer.q_proj, layer.k_proj))
    for head in range(4):
        for m in range(n):
            slope = 2.0 ** (-2 * (head + 1))
            scores = [float(q[m, head] @ k[j, head // 2]) / 8**0.5 - slope * (m - j) for j in range(m + 1)]
            expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
            torch.testing.assert_close(weights[0, head, m, : m + 1].double(), expected, atol=1e-6, rtol=0)
            assert not weights[0, head, m, m + 1 :].any()
