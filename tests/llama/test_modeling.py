"""Our LLaMA against transformers' own, which is the oracle: values, gradients, generation, files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig

from pipeline.llama import modeling
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification, LlamaMLP, LlamaRMSNorm

PAD = 3


def tiny(**changes) -> LlamaConfig:
    facts = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**{**facts, **changes})


def random_config(rng: random.Random) -> LlamaConfig:
    kv = rng.choice([1, 2, 3])
    heads = kv * rng.choice([1, 2, 4])
    size = rng.choice([4, 6, 8])
    rope: dict = {"rope_type": "default", "rope_theta": rng.choice([100.0, 10000.0, 500000.0])}
    if rng.random() < 0.3:
        rope |= {
            "rope_type": "llama3",
            "factor": rng.choice([2.0, 8.0]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": rng.choice([16, 64]),
        }
    return tiny(
        vocab_size=rng.choice([23, 64, 97]),
        hidden_size=heads * size,
        head_dim=rng.choice([None, None, size + 2]),
        intermediate_size=rng.choice([16, 40]),
        num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        attention_bias=rng.random() < 0.4,
        mlp_bias=rng.random() < 0.4,
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters=rope,
    )


def pair(config: LlamaConfig, seed: int = 0) -> tuple[LlamaForCausalLM, transformers.LlamaForCausalLM]:
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # biases and norms away from 0 and 1
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = LlamaForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, at], mask[r, at] = torch.tensor(row), 1
    return ids, mask


def draw(n: int, vocabulary: int = 97) -> list[int]:
    return torch.randint(4, vocabulary, (n,)).tolist()


@pytest.mark.parametrize("block", range(10))
def test_values_gradients_and_greedy_generation_equal_transformers(block: int) -> None:
    rng = random.Random(block)
    for case in range(11):  # 110 configurations in all
        config = random_config(rng)
        ours, theirs = pair(config, seed=100 * block + case)
        ids, mask = padded(
            [draw(n, config.vocab_size) for n in (rng.randint(3, 12), rng.randint(3, 12))],
            rng.choice(["left", "right"]),
        )
        weights = torch.randn(*ids.shape, config.vocab_size) * mask[..., None]
        found, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
        assert ((found - expected) * mask[..., None]).abs().max() <= 1e-5
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-5 * max(1.0, float(q.grad.abs().max())), name
        ids, mask = padded([draw(4, config.vocab_size), draw(7, config.vocab_size)], "left")
        with torch.no_grad():
            written = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (ours, theirs)]
        assert torch.equal(*written)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_side_changes_nothing(implementation: str) -> None:
    ours, theirs = pair(tiny())
    ours.set_attn_implementation(implementation)
    rows = [draw(11), draw(5), draw(8)]
    alone = [theirs(torch.tensor([row])).logits[0] for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        logits = ours(ids, attention_mask=mask).logits
        assert torch.isfinite(logits).all()  # rows that see nothing but padding too
        logits[mask.bool()].square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
        for r, row in enumerate(rows):
            assert (logits[r][mask[r].bool()] - alone[r]).abs().max() <= 1e-5, (side, len(row))


def test_left_padded_batch_generates_what_each_row_does_alone() -> None:
    ours, _ = pair(tiny())
    rows = [draw(n) for n in (3, 9, 5, 12, 4, 7, 6, 10)]
    ids, mask = padded(rows, "left")
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    for r, row in enumerate(rows):
        alone = ours.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :]
        assert together[r, : len(alone)].tolist() == alone.tolist()


def test_cached_decoding_equals_the_full_forward_and_the_cache_reorders() -> None:
    ours, _ = pair(tiny())
    ids = torch.randint(4, 97, (2, 13))
    full = ours(ids).logits
    out = ours(ids[:, :5], use_cache=True)
    steps = [out.logits]
    for t in range(5, 13):
        out = ours(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - full).abs().max() <= 1e-5
    cache = ours(ids[:, :5], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = ours(ids.flip(0)[:, 5:], past_key_values=cache).logits
    assert (swapped - full.flip(0)[:, 5:]).abs().max() <= 1e-5


def test_logits_to_keep_and_hidden_states() -> None:
    ours, theirs = pair(tiny())
    ids = torch.randint(4, 97, (2, 6))
    full = ours(ids, output_hidden_states=True)
    assert torch.equal(ours(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    expected = theirs(ids, output_hidden_states=True).hidden_states
    assert len(full.hidden_states) == len(expected) == 3
    assert max(float((a - b).detach().abs().max()) for a, b in zip(full.hidden_states, expected, strict=True)) <= 1e-5
    assert (ours(ids, labels=ids).loss - theirs(ids, labels=ids).loss).abs() <= 1e-6


def test_heads_of_a_group_stand_together() -> None:
    """Key head j serves query heads 2j and 2j + 1: silencing key head 1 must leave query heads 0 and 1 alone."""
    layer = LlamaForCausalLM(tiny(num_hidden_layers=1)).model.layers[0].self_attn
    size = layer.head_dim
    seen = {}
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("out", inputs[0].clone()))
    x = torch.randn(1, 5, 32)
    angles = torch.zeros(1, 5, size)
    before = (layer(x, (angles.cos(), angles.sin())), seen["out"])[1]
    with torch.no_grad():
        layer.v_proj.weight[size:] = 0
    after = (layer(x, (angles.cos(), angles.sin())), seen["out"])[1]
    assert torch.equal(before[..., : 2 * size], after[..., : 2 * size])
    assert after[..., 2 * size :].abs().max() == 0 and before[..., 2 * size :].abs().min() > 0


def test_norm_in_bfloat16_is_within_one_unit_of_the_exact_one() -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, 1e-6).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
    for scale in (1e-4, 1.0, 300.0):
        x = (scale * torch.randn(50, 64)).to(torch.bfloat16)
        wide = x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)  # 8 bits of precision
        assert ((norm(x).double() - exact).abs() <= unit).all()


def test_norm_gradients_in_double() -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    g = torch.randn(3, 5, 8)
    modeling._Norm.apply(x, w, 1e-5).backward(g)
    xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (xd * torch.rsqrt(xd.square().mean(-1, keepdim=True) + 1e-5) * wd).backward(g.double())
    assert (x.grad - xd.grad).abs().max() <= 1e-6 and (w.grad - wd.grad).abs().max() <= 1e-5


def test_checkpointing_gives_the_same_gradients() -> None:
    ours, _ = pair(tiny())
    ids = torch.randint(4, 97, (2, 9))
    ours.train()
    grads = []
    for on in (False, True):
        if on:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("tied", [False, True])
def test_files_move_both_ways(tied: bool, tmp_path: Path) -> None:
    ours, theirs = pair(tiny(tie_word_embeddings=tied))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    names = []
    for source in ("ours", "theirs"):
        with safe_open(tmp_path / source / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1] and ("lm_head.weight" in names[0]) == (not tied)
    configs = [json.loads((tmp_path / s / "config.json").read_text()) for s in ("ours", "theirs")]
    assert configs[0] == configs[1] and configs[0]["architectures"] == ["LlamaForCausalLM"]
    ids = torch.randint(4, 97, (2, 9))
    crossed, info = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(crossed(ids).logits, ours(ids).logits)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    same = crossed.lm_head.weight.data_ptr() == crossed.model.embed_tokens.weight.data_ptr()
    assert same == tied
    total = sum(p.numel() for p in crossed.parameters())
    stored = (tmp_path / "ours" / "model.safetensors").stat().st_size
    assert 4 * total <= stored <= 4 * total + 8192  # a tied head is on disk once


def test_a_forest_implementation_is_not_written_to_the_config(tmp_path: Path) -> None:
    ours, _ = pair(tiny())
    ours.set_attn_implementation("forest")
    ours.save_pretrained(tmp_path)
    assert "forest" not in (tmp_path / "config.json").read_text()


def test_auto_classes_open_saved_directories_in_a_process_without_this_project(tmp_path: Path) -> None:
    ours, _ = pair(tiny())
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(tiny(num_labels=1)).eval()
    ours.save_pretrained(tmp_path / "lm")
    classifier.save_pretrained(tmp_path / "scorer")
    ids = torch.randint(4, 97, (1, 9))
    program = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification\n"
        "lm, scorer = (c.from_pretrained(p) for c, p in ((AutoModelForCausalLM, 'lm'),"
        " (AutoModelForSequenceClassification, 'scorer')))\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "assert not any(m.startswith('pipeline') for m in sys.modules)\n"
        "assert type(lm).__module__.startswith('transformers.')\n"
        "print(json.dumps([lm(ids).logits[0, -1].tolist(), scorer(ids).logits[0].tolist()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits, score = json.loads(done.stdout.strip().splitlines()[-1])
    assert (torch.tensor(logits) - ours(ids).logits[0, -1]).abs().max() <= 1e-5
    assert (torch.tensor(score) - classifier(ids).logits[0]).abs().max() <= 1e-5


def test_auto_registrations_of_llama_are_transformers_own() -> None:
    assert transformers.AutoModelForCausalLM._model_mapping[LlamaConfig] is transformers.LlamaForCausalLM


# --------------------------------------------------------------------------------------------------------------- scores


def test_score_stands_at_the_last_real_token_whatever_the_padding() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny(num_labels=1)).eval()
    rows = [[5, PAD, 7, PAD], [9, 10], [11, 12, PAD, 13, 14, 15]]  # the pad id also stands in the text
    with torch.no_grad():
        alone = [model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits.item() for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        found = model(ids, attention_mask=mask).logits.squeeze(1)
        assert (found - torch.tensor(alone)).abs().max() <= 1e-6
    theirs = transformers.LlamaForSequenceClassification(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    plain, _ = padded([draw(6), draw(4)], "right")
    assert (theirs(plain).logits - model(plain).logits).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="attention_mask"):
        LlamaForSequenceClassification(tiny(num_labels=1, pad_token_id=None))(plain)


def test_autocast_to_float16_is_left_to_pytorch():
    """The compiled SwiGLU takes float32 and bfloat16, and what it gets is the product, not its input."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=97)
    mlp, x = LlamaMLP(config), torch.randn(7, 32)
    exact = mlp(x)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", dtype):
            assert (mlp(x).float() - exact).abs().max() <= bound
