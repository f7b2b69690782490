"""Meta's layout: rotary order by hand, shards cut and joined bit for bit, the model that Meta's own formulas give."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.data.chat import ChatFormat
from pipeline.flow.errors import UserError
from pipeline.llama.meta import SCALED, WIDTHS, _params, _preset, _width, export_meta, import_meta
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.open import open_tokenizer
from pipeline.llama.presets import PRESETS
from pipeline.llama.save import save_model
from pipeline.llama.tokenizer import from_tiktoken

PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 16,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
INNER = 112  # int(8 * 32 / 3) = 85; int(1.3 * 85) = 110; the next multiple of 16


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A tiktoken file of single bytes: 512 tokens with the special ones."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256)))
    return path


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Random weights under Meta's names."""
    p = {**PARAMS, **changes}
    d, kv = p["dim"], p["dim"] // p["n_heads"] * p["n_kv_heads"]
    made = {"tok_embeddings.weight": (512, d), "norm.weight": (d,), "output.weight": (512, d)}
    for layer in range(p["n_layers"]):
        of = {
            "attention.wq": (d, d), "attention.wk": (kv, d), "attention.wv": (kv, d), "attention.wo": (d, d),
            "feed_forward.w1": (INNER, d), "feed_forward.w2": (d, INNER), "feed_forward.w3": (INNER, d),
            "attention_norm": (d,), "ffn_norm": (d,),
        }  # fmt: skip
        made |= {f"layers.{layer}.{name}.weight": shape for name, shape in of.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in made.items()}


def write(directory: Path, weights: dict[str, Tensor], shards: int = 1, embedding: int = 1, **changes: Any) -> Path:
    """As fairscale's parallel layers are cut: rows of q, k, v, w1, w3 and the head, columns of wo and w2."""
    directory.mkdir()
    for shard in range(shards):
        part = {"rope.freqs": torch.ones(4)} if not shard else {}
        for name, whole in weights.items():
            axis = embedding if name.startswith("tok_") else 1 if name.endswith((".wo.weight", ".w2.weight")) else 0
            cut = whole if "norm" in name else whole.chunk(shards, axis)[shard]
            part[name] = cut.contiguous().clone()
        save_file(part, directory / f"consolidated.{shard:02}.safetensors")
    (directory / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    return directory


def test_the_order_of_rotary_pairs_by_hand(ranks: Path, tmp_path: Path, shared: Path) -> None:  # T49
    """Row i of every head of queries and keys is filled with i."""
    weights = tensors()
    weights["layers.0.attention.wq.weight"] = torch.arange(8.0).repeat(4)[:, None].expand(32, 32).contiguous()
    weights["layers.0.attention.wk.weight"] = torch.arange(8.0).repeat(2)[:, None].expand(16, 32).contiguous()
    import_meta(write(tmp_path / "meta", weights), ranks, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    oracle = json.loads((shared / "oracles.json").read_text())["rope hf_row[k]=meta_row[perm[k]] head_dim 8"]
    assert oracle == [0, 2, 4, 6, 1, 3, 5, 7]
    assert state["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist() == oracle * 4
    assert state["model.layers.0.self_attn.k_proj.weight"][:, 5].tolist() == oracle * 2
    value = state["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(value, weights["layers.0.attention.wv.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shards", "embedding"), [(1, 1), (2, 1), (2, 0)])
def test_meta_to_ours_to_meta_is_the_same_bits(
    dtype: torch.dtype, shards: int, embedding: int, ranks: Path, tmp_path: Path
) -> None:
    weights = tensors(dtype)
    import_meta(write(tmp_path / "meta", weights, shards, embedding), ranks, tmp_path / "ours")
    export_meta(tmp_path / "ours", _made(tmp_path / "again"), shards)
    back = [load_file(tmp_path / "again" / f"consolidated.{n:02}.safetensors") for n in range(shards)]
    first = load_file(write(tmp_path / "small", weights, shards, 1) / "consolidated.00.safetensors")
    assert {name: t.shape for name, t in back[0].items()} == {n: t.shape for n, t in first.items() if n != "rope.freqs"}
    for name, whole in weights.items():
        parts = [file[name] for file in back]
        axis = 1 if name.startswith("tok_") or name.endswith((".wo.weight", ".w2.weight")) else 0
        joined = parts[0] if "norm" in name else torch.cat(parts, axis)
        assert joined.dtype == dtype and torch.equal(joined, whole), name
    assert _width(32, *_widths(json.loads((tmp_path / "again" / "params.json").read_text()))) == INNER


def test_ours_to_meta_to_ours_is_the_same_files(ranks: Path, tmp_path: Path) -> None:
    import_meta(write(tmp_path / "meta", tensors()), ranks, tmp_path / "ours", template="llama-3.1")
    for shards in (1, 2):
        export_meta(tmp_path / "ours", _made(tmp_path / f"meta{shards}"), shards)
        import_meta(tmp_path / f"meta{shards}", ranks, tmp_path / f"again{shards}", template="llama-3.1")
        for path in (tmp_path / "ours").iterdir():
            assert path.read_bytes() == (tmp_path / f"again{shards}" / path.name).read_bytes(), path.name
    chat = ChatFormat(open_tokenizer(tmp_path / "ours"))
    assert chat.template.name == "llama-3.1" and len(chat.tokenizer) == 512  # its tokens were there: nothing grew
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert tuple(kept["eos_token_id"]) == chat.stop_ids


def meta_logits(weights: dict[str, Tensor], params: dict[str, Any], ids: list[int]) -> Tensor:
    """Transformer.forward of Meta's model.py in float64: pairs (2i, 2i + 1) turned as complex numbers."""
    w = {name: t.double() for name, t in weights.items()}
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    size, length = dim // heads, len(ids)
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    turns = torch.polar(torch.ones(length, size // 2).double(), torch.outer(torch.arange(length).double(), frequencies))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, size // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    causal = torch.full((length, length), float("-inf")).double().triu(1)
    for layer in range(params["n_layers"]):
        of = lambda name, layer=layer: w[f"layers.{layer}.{name}.weight"]
        h = norm(x, of("attention_norm"))
        q, k, v = ((h @ of(f"attention.w{name}").T).view(length, -1, size) for name in "qkv")
        q, k = rotated(q), rotated(k).repeat_interleave(heads // kv_heads, 1)
        v = v.repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + causal
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ of("attention.wo").T
        h = norm(x, of("ffn_norm"))
        x = x + (silu(h @ of("feed_forward.w1").T) * (h @ of("feed_forward.w3").T)) @ of("feed_forward.w2").T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("shards", [1, 2])
def test_logits_are_those_of_metas_formulas(shards: int, ranks: Path, tmp_path: Path) -> None:  # T49, T50
    weights = tensors()
    import_meta(write(tmp_path / "meta", weights, shards, 0), ranks, tmp_path / "ours")
    ids = [256, 3, 1, 4, 1, 5, 9, 2, 6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].double()
    assert type(model).__module__.startswith("transformers")
    assert (found - meta_logits(weights, PARAMS, ids)).abs().max() <= 1e-5


def test_a_head_that_is_the_embedding_is_tied_and_written_out_again(ranks: Path, tmp_path: Path) -> None:  # T51
    weights = tensors()
    for number, change in enumerate((lambda w: w.pop("output.weight"), lambda w: w.update(_head_as_embedding(w)))):
        change(changed := dict(weights))
        import_meta(write(tmp_path / f"meta{number}", changed), ranks, tmp_path / f"ours{number}")
        assert "lm_head.weight" not in load_file(tmp_path / f"ours{number}" / "model.safetensors")
        export_meta(tmp_path / f"ours{number}", _made(tmp_path / f"again{number}"))
        back = load_file(tmp_path / f"again{number}" / "consolidated.00.safetensors")
        assert torch.equal(back["output.weight"], back["tok_embeddings.weight"])
        assert torch.equal(back["output.weight"], weights["tok_embeddings.weight"])


def _head_as_embedding(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output.weight": weights["tok_embeddings.weight"].clone()}


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if n.startswith("llama-")])
def test_params_of_every_published_model_lead_back_to_its_preset(name: str) -> None:
    """LLaMA and Llama 2 of one shape differ in epsilon, Llama 3 and 3.1 in their scaling."""
    preset = PRESETS[name]
    params = _params(LlamaConfig(**preset).to_dict())
    assert _width(params["dim"], *_widths(params)) == preset["intermediate_size"]
    assert (params.get("multiple_of"), params.get("ffn_dim_multiplier")) in WIDTHS
    scaled = params.get("use_scaled_rope", False)
    shape = {k: preset[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                    "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    assert _preset(shape, params.get("rope_theta", 1e4), scaled, params["norm_eps"]) is preset
    assert scaled is ("rope_parameters" in preset)


def test_scaled_positions_are_llama_31s(ranks: Path, tmp_path: Path) -> None:
    import_meta(write(tmp_path / "meta", tensors(), use_scaled_rope=True), ranks, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["max_position_embeddings"] == 131072
    assert config["rope_parameters"] == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    export_meta(tmp_path / "ours", _made(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "params.json").read_text())["use_scaled_rope"] is True


def test_what_is_not_whole_or_not_llama_is_refused(ranks: Path, tmp_path: Path) -> None:
    weights = tensors()
    numbers = iter(range(99))

    def refused(words: str, shards: int = 1, spoil: Any = None, change: Any = None, **params: Any) -> None:
        given = dict(weights)
        if change:
            change(given)
        place = write(tmp_path / f"meta{next(numbers)}", given, shards, **params)
        if spoil:
            spoil(place)
        with pytest.raises(UserError, match=words):
            import_meta(place, ranks, tmp_path / "never")

    refused("unknown key 'quantization_args'", quantization_args={"scheme": "int4"})
    refused("n_layers", n_layers="two")
    refused("multiple_of: .*greater than or equal to 1", multiple_of=0)
    refused("norm_eps", norm_eps="small")
    refused("lacks layers.2.attention.wk.weight", n_layers=3)
    refused("holds beside .* layers.1.attention.wk.weight", n_layers=1)
    refused("n_kv_heads 3 do not fit together", n_kv_heads=3)
    refused(r"wk.weight is .16, 32. in 1 files; .* makes .32, 32. in all", n_kv_heads=4)
    refused(r"w1.weight is .112, 32. in 1 files; .* makes .96, 32. in all", ffn_dim_multiplier=None)
    refused(r"tok_embeddings.weight is .512, 32. in 1 files; .* makes .500, 32. in all", vocab_size=500)
    refused(r"attention_norm.weight is .31,. in", change=lambda w: w.update(_cut_norm(w)))
    refused(
        r"wo.weight is .32, 16., .32, 8. in 2 files", 2, lambda p: _edit(p / "consolidated.01.safetensors", _without_wo)
    )
    refused(
        "has consolidated files .1., one of them is missing", 2, lambda p: (p / "consolidated.00.safetensors").unlink()
    )
    refused(r"in 1 files; .* in all", 2, lambda p: (p / "consolidated.01.safetensors").unlink())
    refused("differs between its files", 2, lambda p: _edit(p / "consolidated.01.safetensors", _other_norm))
    refused("several precisions", change=lambda w: w.update({"norm.weight": w["norm.weight"].half()}))
    refused("ends|bytes", spoil=lambda p: _cut(p / "consolidated.00.safetensors"))
    place = _made(tmp_path / "pickled")
    (place / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(UserError, match="no consolidated.00.safetensors"):
        import_meta(place, ranks, tmp_path / "never")
    (place / "consolidated.00.pth").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="only pickles .consolidated.00.pth., which can run code"):
        import_meta(place, ranks, tmp_path / "never")


def _edit(path: Path, change: Any) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def _other_norm(state: dict[str, Tensor]) -> None:
    state["norm.weight"] += 1


def _without_wo(state: dict[str, Tensor]) -> None:
    state["layers.0.attention.wo.weight"] = state.pop("layers.0.attention.wo.weight")[:, :8].contiguous()


def _cut_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"layers.1.attention_norm.weight": weights["layers.1.attention_norm.weight"][:31].clone()}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def test_what_meta_has_no_place_for_is_refused(ranks: Path, tmp_path: Path) -> None:
    tokenizer = from_tiktoken(ranks)
    shape = {**PRESETS["test"], "vocab_size": 512}
    for number, (change, shards, words) in enumerate((
        ({"attention_bias": True}, 1, "Meta's layout holds plain LLaMA; here: attention_bias"),
        ({"head_dim": 16}, 1, "head_dim 16"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **SCALED,
                              "original_max_position_embeddings": 64}}, 1, "its own constants"),
        ({}, 4, "--shards 4: does not divide num_key_value_heads 2"),
    )):  # fmt: skip
        place = tmp_path / f"model{number}"
        save_model(LlamaForCausalLM(LlamaConfig(**{**shape, **change})), tokenizer, place)
        with pytest.raises(UserError, match=words):
            export_meta(place, _made(tmp_path / f"out{number}"), shards)
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter; Meta's layout holds whole models"):
        export_meta(place, tmp_path / "out0")


def test_a_width_that_no_published_model_has_is_exported_too(ranks: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    save_model(LlamaForCausalLM(LlamaConfig(**{**PRESETS["test"], "vocab_size": 512})), from_tiktoken(ranks), place)
    export_meta(place, _made(tmp_path / "meta"))
    assert _width(32, *_widths(json.loads((tmp_path / "meta" / "params.json").read_text()))) == 48
    import_meta(tmp_path / "meta", ranks, tmp_path / "again")
    for key, tensor in load_file(place / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again" / "model.safetensors")[key])
    shutil.rmtree(place)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _widths(params: dict[str, Any]) -> tuple[int, float | None]:
    return params["multiple_of"], params.get("ffn_dim_multiplier")
