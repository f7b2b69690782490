"""Rotary positions of every kind: frequencies by hand, and the whole model against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from pipeline.data.forest import Segment, build
from pipeline.llama import decode
from pipeline.llama.attention import forest_inputs, use_forest
from pipeline.llama.rope import frequencies, new_rotary
from pipeline.llama.rope_settings import RopeSettings
from tests.llama.test_modeling import draw, padded, pair, tiny

TRAINED = 16  # what dynamic takes for the trained length
KINDS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn by hand": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED, "attention_factor": 1.3,
        "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "another base": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip


def stretched(kind: str, **changes):
    return tiny(max_position_embeddings=TRAINED, rope_parameters={"rope_theta": 1e4, **KINDS[kind]}, **changes)


def inverse(rope: dict, size: int = 8) -> tuple[list[float], float]:
    found, scale = frequencies(tiny(head_dim=size, max_position_embeddings=64, rope_parameters=rope))
    return found.tolist(), scale


def test_frequencies_by_hand() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert inverse(plain)[0] == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)
    wide, _ = inverse({"rope_type": "default", "rope_theta": 5e5}, 128)
    assert [wide[0], wide[1], wide[63]] == pytest.approx([1.0, 0.8146172338565447, 2.455140791131609e-06], rel=1e-5)
    assert inverse({**plain, "rope_type": "linear", "factor": 2.0})[0] == pytest.approx([0.5, 0.05, 0.005, 0.0005])
    # Pairs that turn 10.2, 1.02, 0.1 and 0.01 times in 64 tokens; bounds of yarn: below pair 0, and pair 1.008 -> 2.
    yarn = {**plain, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found, scale = inverse(yarn)
    assert found == pytest.approx([1.0, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4], rel=1e-6)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    llama3 = {
        **plain, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    smooth = (64 * 0.1 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1 * ((1 - smooth) / 8 + smooth), 0.01 / 8, 0.001 / 8]
    assert inverse(llama3)[0] == pytest.approx(expected, rel=1e-5)


def test_the_ntk_aware_base_by_hand() -> None:
    """10,000 x 2^(8/6): the fastest pair stays, the slowest turns half as fast."""
    rope = RopeSettings(ntk_factor=2).parameters(1e4, 64, 8)
    assert rope == {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 2 ** (8 / 6))}
    found, _ = inverse(rope)
    assert found == pytest.approx([1.0, 0.1 * 2 ** (-1 / 3), 0.01 * 2 ** (-2 / 3), 0.0005], rel=1e-5)


def test_dynamic_angles_follow_the_position() -> None:
    """Twice the trained length at factor 2: the base grows by 3^(8/6), so the slowest pair turns a third as fast."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    rotary = new_rotary(tiny(head_dim=8, max_position_embeddings=64, rope_parameters=rope))
    angles = rotary.angles(torch.tensor([[0, 1, 63, 127]]))[0]
    assert angles[:3, 3].tolist() == pytest.approx([0.0, 0.001, 0.063], rel=1e-6)
    assert float(angles[3, 3]) == pytest.approx(127 * 0.001 / 3, rel=1e-5)
    assert float(angles[3, 0]) == 127.0
    assert torch.equal(angles[:3], rotary.angles(torch.tensor([0, 1, 63])))  # whatever stands beside


def test_a_kind_that_nobody_knows_is_refused() -> None:
    config = tiny()
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="'longrope': this core knows default, linear, dynamic, yarn, llama3"):
        frequencies(config)


def lengths_of(kind: str) -> tuple[int, ...]:
    return (TRAINED, 9, 13) if kind == "dynamic" else (40, 9, 23)  # beyond it dynamic has a test of its own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers(kind: str, side: str) -> None:
    ours, theirs = pair(stretched(kind))
    ids, mask = padded([draw(n) for n in lengths_of(kind)], side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    weights = torch.randn(*ids.shape, 97) * mask[..., None]
    given = {"attention_mask": mask, "position_ids": positions}
    found, expected = (m(ids, **given).logits for m in (ours, theirs))
    assert ((found - expected) * mask[..., None]).abs().max() <= 1e-5
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * max(1.0, float(q.grad.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["kernel", "grouped", "dense"])
def test_forests_equal_transformers_row_by_row(kind: str, backend: str) -> None:
    ours, theirs = pair(stretched(kind))
    assert use_forest(ours)
    longest = lengths_of(kind)[0]
    prompt, *answers = draw(7), draw(longest - 7), draw(5)
    alone = draw(longest - 3)
    forest = build([[Segment(prompt), *(Segment(a, parent=0) for a in answers)], [Segment(alone)]])
    forest.cache["backend"] = backend
    states = ours.model(**forest_inputs(forest)).last_hidden_state[0]
    logits, at = ours.lm_head(states)[: len(forest)], 7
    expected = [theirs(torch.tensor([prompt + a])).logits[0] for a in answers]
    assert (logits[:7] - expected[0][:7]).abs().max() <= 1e-5
    for answer, full in zip(answers, expected, strict=True):
        assert (logits[at : at + len(answer)] - full[7:]).abs().max() <= 1e-5
        at += len(answer)
    assert (logits[at:] - theirs(torch.tensor([alone])).logits[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_and_transformers(kind: str) -> None:
    ours, theirs = pair(stretched(kind))
    ids = torch.tensor([draw(40), draw(40)])
    caches = DynamicCache(config=ours.config), DynamicCache(config=theirs.config)
    full = ours(ids).logits
    first = 12
    for at in [0, *range(first, 40)]:
        piece = ids[:, :first] if at == 0 else ids[:, at : at + 1]
        found, expected = (m(piece, past_key_values=c).logits for m, c in zip((ours, theirs), caches, strict=True))
        assert (found - expected).abs().max() <= 1e-5
        assert (found - full[:, at : at + piece.shape[1]]).abs().max() <= 1e-5
    assert torch.equal(*(m.generate(ids[:, :6], max_new_tokens=20, do_sample=False) for m in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runner", [decode.LayerRunner, decode.ForwardRunner])
@torch.no_grad()
def test_the_engine_decodes_what_the_full_forward_says(kind: str, runner) -> None:
    """With the compiled step and attention where they are built."""
    ours, _ = pair(stretched(kind, hidden_size=32, num_attention_heads=4, intermediate_size=48))
    assert decode.runs_by_layer(ours)
    rows = [draw(20), draw(11)]
    cache = decode.new_cache(ours, 2, 40)
    engine = runner(ours, cache)
    ids, _ = padded(rows, "right")
    logits = [engine.prefill(ids, torch.tensor([20, 11]), torch.tensor([[0], [1]]))]
    for step in range(12):
        for row in rows:
            row.append(4 + step)
        positions = torch.tensor([len(row) - 1 for row in rows])
        logits.append(engine.step(torch.tensor([row[-1] for row in rows]), positions, int(positions.max()) + 1))
    for r, row in enumerate(rows):
        full = ours(torch.tensor([row])).logits[0, -13:]
        assert (torch.stack([step[r] for step in logits]) - full).abs().max() <= 1e-5


@torch.no_grad()
def test_dynamic_beyond_the_trained_length() -> None:
    """No row knows its neighbours, in batches and forests alike; in transformers the longest row decides for all, also
    one of an earlier batch."""
    ours, theirs = pair(stretched("dynamic"))
    long, short = draw(40), draw(24)
    ids, mask = padded([long, short], "right")
    together, alone = ours(ids, attention_mask=mask).logits[1, :24], ours(torch.tensor([short])).logits[0]
    assert (together - alone).abs().max() <= 1e-5
    use_forest(ours)
    forest = build([[Segment(long[:10]), Segment(long[10:], parent=0), Segment(short, parent=0)], [Segment(short)]])
    forest.cache["backend"] = "grouped"
    found = ours.lm_head(ours.model(**forest_inputs(forest)).last_hidden_state[0])[: len(forest)]
    assert (found[-24:] - alone).abs().max() <= 1e-5
    family = ours(torch.tensor([long[:10] + short])).logits[0, 10:]
    assert (found[40:64] - family).abs().max() <= 1e-5
    theirs_alone = theirs(torch.tensor([short])).logits[0]
    assert (theirs(ids, attention_mask=mask).logits[1, :24] - theirs_alone).abs().max() > 1e-3
    assert (theirs(torch.tensor([short])).logits[0] - theirs_alone).abs().max() > 1e-3
    cache, steps = DynamicCache(config=theirs.config), []
    for token in short:
        steps.append(theirs(torch.tensor([[token]]), past_key_values=cache).logits[0, 0])
    assert (torch.stack(steps) - alone).abs().max() <= 1e-5


def test_two_settings_do_not_share_the_angles_of_a_forest() -> None:
    forest = build([[Segment(draw(30))]])
    for kind in KINDS:
        ours, theirs = pair(stretched(kind))
        use_forest(ours)
        found = ours.lm_head(ours.model(**forest_inputs(forest)).last_hidden_state[0])[:30]
        if kind != "dynamic":
            assert (found - theirs(forest.ids_T[None]).logits[0]).abs().max() <= 1e-5
