"""The truncated basis by hand; ReRoPE and its leaky form against the formula, written out in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from pipeline.data.forest import Segment, build
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama import decode
from pipeline.llama.config import check_config
from pipeline.llama.core import CoreForCausalLM
from pipeline.llama.core_config import new_config
from pipeline.llama.heads import PolicyModel, hidden_states
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.open import open_policy
from pipeline.llama.options.rope import RectifiedAttention, truncated
from pipeline.llama.presets import ModelSettings
from pipeline.llama.save import save_model
from tests.small import artifact, chat

KINDS = {
    "truncated": {"truncated_basis_low": 0.005, "truncated_basis_high": 0.05, "truncated_basis_value": 0.01},
    "rectified": {"rerope_window": 6},
    "leaky": {"rerope_window": 6, "rerope_factor": 4.0},
    "scaled by length": {"rerope_window": 6, "rerope_trained": 8},
}


def new_model(seed: int = 0, **options) -> CoreForCausalLM:
    settings = ModelSettings(preset="test", initializer_range=0.2, **options)
    torch.manual_seed(seed)
    return CoreForCausalLM(new_config(settings.llama(len(chat().tokenizer)), pad_token_id=0)).eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(4, 97, shape)


def test_a_truncated_basis_by_hand() -> None:
    inverse = torch.tensor([1.0, 0.1, 0.01, 0.001])
    assert truncated(inverse, 0.001, 0.1, 0.02).tolist() == pytest.approx([1.0, 0.1, 0.02, 0.0])
    assert truncated(inverse, 0.0, 2 * math.pi / 64, 0.0).tolist() == pytest.approx([1.0, 0.1, 0.0, 0.0])
    model = new_model(**KINDS["truncated"])
    assert model.model.rotary.inverse.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.0])


def scores_by_hand(q: torch.Tensor, k: torch.Tensor, window: int, factor: float, trained: int | None) -> torch.Tensor:
    """[n, n] of one head: pair (i, i + h) of the query turned by (the rectified distance) theta_i."""
    n, size = q.shape
    half, out = size // 2, torch.zeros(n, n, dtype=torch.float64)
    theta = [10000.0 ** (-2 * i / size) for i in range(half)]
    for m in range(n):
        for j in range(m + 1):
            distance = m - j if m - j < window else window + (m - j - window) / factor
            total = 0.0
            for i in range(half):
                c, s = math.cos(distance * theta[i]), math.sin(distance * theta[i])
                a, b = float(q[m, i]), float(q[m, i + half])
                total += (a * c - b * s) * float(k[j, i]) + (a * s + b * c) * float(k[j, i + half])
            out[m, j] = total / math.sqrt(size) * (max(1.0, math.log(m + 1) / math.log(trained)) if trained else 1.0)
    return out


@pytest.mark.parametrize("kind", ["rectified", "leaky", "scaled by length"])
def test_attention_is_the_formula(kind: str) -> None:
    options = KINDS[kind]
    model = new_model(**options, num_attention_heads=1, num_key_value_heads=1, hidden_size=8, num_hidden_layers=1)
    layer = model.model.layers[0].self_attn
    assert type(layer) is RectifiedAttention
    x, n = torch.randn(1, 15, 8), 15
    _, weights = layer(x, model.model.rotary.cos_sin(torch.arange(n)[None], torch.float32))
    scores = scores_by_hand(
        layer.q_proj(x)[0].detach(), layer.k_proj(x)[0].detach(), 6, options.get("rerope_factor", math.inf),
        options.get("rerope_trained"),
    )  # fmt: skip
    hidden = torch.ones(n, n).triu(1).bool()
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1)
    assert (weights[0, 0].double() - expected).abs().max() <= 1e-6


def test_within_the_window_it_is_plain_rotary() -> None:
    rectified = new_model(rerope_window=20)
    plain = LlamaForCausalLM(LlamaConfig(**ModelSettings(preset="test").llama(len(chat().tokenizer)))).eval()
    plain.load_state_dict(rectified.state_dict())
    ids = draw(2, 20)
    assert (plain(ids).logits - rectified(ids).logits).abs().max() <= 1e-5
    longer = draw(1, 30)
    assert (plain(longer).logits - rectified(longer).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(kind: str) -> None:
    model = new_model(**KINDS[kind])
    ids = draw(2, 24)
    full = model(ids).logits
    out = model(ids[:, :9], use_cache=True)
    steps = [out.logits]
    for t in range(9, 24):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - full).abs().max() <= 1e-5
    rows = [ids[0, :14].tolist(), ids[1, :5].tolist()]
    cache = decode.new_cache(model, 2, 32)
    engine = decode.new_runner(model, cache)
    prompt = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    logits = [engine.prefill(prompt, torch.tensor([14, 5]), torch.tensor([[0], [1]]))]
    for at in range(8):
        tokens, positions = torch.tensor([ids[0, 14 + at], ids[1, 5 + at]]), torch.tensor([14 + at, 5 + at])
        logits.append(engine.step(tokens, positions, 15 + at))
    found = torch.stack(logits)
    assert (found[:, 0] - full[0, 13:22]).abs().max() <= 1e-5 and (found[:, 1] - full[1, 4:13]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_forests_and_padding_on_either_side_change_nothing(kind: str) -> None:
    model = new_model(**KINDS[kind])
    rows = [draw(17), draw(9)]
    alone = [model(row[None]).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
        for r, row in enumerate(rows):
            at = slice(17 - len(row), 17) if side == "left" else slice(0, len(row))
            ids[r, at], mask[r, at] = row, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for r, row in enumerate(alone):
            assert (logits[r][mask[r].bool()] - row).abs().max() <= 1e-5, side
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[1, 17:]
    left = torch.cat((torch.zeros(8, dtype=torch.long), rows[1]))[None]
    seen = (torch.arange(17) >= 8).long()[None]
    padded = model.generate(left, attention_mask=seen, max_new_tokens=5, do_sample=False)[0, 17:]
    bare = model.generate(rows[1][None], max_new_tokens=5, do_sample=False)[0, 9:]
    assert padded.tolist() == bare.tolist() and len(together) == 5
    prompt, answers = draw(6), [draw(11), draw(4)]
    forest = build([[Segment(prompt.tolist()), *(Segment(a.tolist(), parent=0) for a in answers)]])
    states = hidden_states(model, forest)
    model.zero_grad()
    PolicyModel(model)(forest, select_T=forest.segment_T > 0).logprobs_T.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    at, total = 6, 0.0
    for answer in answers:
        row = torch.cat((prompt, answer))[None]
        full = model.model(row).last_hidden_state[0]
        assert (states[at : at + len(answer)] - full[6:]).abs().max() <= 1e-5
        at += len(answer)
        total = total + model(row).logits[0, 5:-1].log_softmax(-1).gather(1, answer[:, None]).sum()
    total.backward()
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).abs().max() <= 1e-5 * max(1.0, float(p.grad.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_under_its_own_type_and_comes_back(kind: str, tmp_path: Path) -> None:
    model = new_model(**KINDS[kind])
    save_model(model, chat().tokenizer, tmp_path / "model")
    opened = open_policy(artifact(tmp_path / "model", "policy"))
    assert opened.record["implementation"] == "core" and opened.model.config.model_type == "rlhf_llama"
    assert {k: getattr(opened.model.config, k) for k in KINDS[kind]} == KINDS[kind]
    ids = draw(1, 20)
    assert torch.equal(opened.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("change, words", [
    ({"truncated_basis_low": 0.1}, "do nothing without truncated_basis_high"),
    ({"truncated_basis_high": 0.1, "truncated_basis_low": 0.2}, "truncated_basis_high is 0.1, below"),
    ({"rerope_factor": 2.0}, "rerope_factor does nothing without rerope_window"),
    ({"rerope_window": 4, "rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_type is dynamic"),
    ({"rerope_window": 0}, "rerope_window"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_settings(ModelSettings, {"preset": "test", **change}, "model")
    config = new_config(ModelSettings(preset="test", rerope_window=4).llama(97)).to_dict()
    with pytest.raises(UserError, match=words):
        check_config({**config, "rerope_window": None, "rerope_trained": None, **change})
