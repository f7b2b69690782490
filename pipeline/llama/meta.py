"""Meta's layout of LLaMA weights, given as safetensors: both ways, bit for bit.

    import_meta(directory, pieces, out)         params.json, consolidated.00.safetensors ... -> a Hugging Face directory
    export_meta(directory, out, shards=2)       -> params.json and consolidated files, what Meta's reference code reads

    layers.0.attention.wq.weight    model.layers.0.self_attn.q_proj.weight, pairs (2i, 2i + 1) of a head for (i, i + h)
    layers.0.attention.wo.weight    model.layers.0.self_attn.o_proj.weight
    tok_embeddings.weight, output.weight        model.embed_tokens.weight, lm_head.weight

Several files are ranks of tensor parallelism (meta-llama/llama, model.py): queries, keys, values, w1, w3 and the head
are cut by rows, wo and w2 by columns, the embedding by columns (LLaMA, Llama 2) or rows (Llama 3); norms are in every
file. Meta publishes pickles, which may run code when opened: convert those to safetensors elsewhere.

params.json knows neither the context length nor the factor of scaled positions: they are those of the preset of the
same shape, base, scaling and epsilon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import LlamaConfig

from pipeline.flow.config import Settings, parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.config import SIZES, check_config, read_json
from pipeline.llama.llama2c import to_half_split, to_interleaved
from pipeline.llama.make import give_chat
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.presets import PRESETS
from pipeline.llama.save import save_model
from pipeline.llama.tokenizer import open_pieces, require_vocabulary
from pipeline.llama.weights import ADAPTER_CONFIG, Entry, header, require_weights

FILE = re.compile(r"consolidated(?:\.(\d\d))?\.safetensors")
UNUSED = {"rope.freqs"}  # a table that Meta's first releases stored beside the weights
SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # Meta's constants
WIDTHS = ((256, None), (1024, 1.3), (4096, 1.3), (4096, 1.2), (256, 1.5), (256, 1.0))  # of its published models
ROWS, COLUMNS, WHOLE = 0, 1, None
LAYER: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", ROWS),
    "attention.wk": ("self_attn.k_proj", ROWS),
    "attention.wv": ("self_attn.v_proj", ROWS),
    "attention.wo": ("self_attn.o_proj", COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", ROWS),
    "feed_forward.w2": ("mlp.down_proj", COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", ROWS),
    "attention_norm": ("input_layernorm", WHOLE),
    "ffn_norm": ("post_attention_layernorm", WHOLE),
}
AROUND: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", COLUMNS),
    "norm": ("model.norm", WHOLE),
    "output": ("lm_head", ROWS),
}


class Params(Settings):
    """params.json; what is not there is Meta's default (ModelArgs in model.py)."""

    dim: int = Field(ge=2, le=SIZES["hidden_size"])
    n_layers: int = Field(ge=1, le=SIZES["num_hidden_layers"])
    n_heads: int = Field(ge=1, le=SIZES["num_attention_heads"])
    n_kv_heads: int | None = Field(None, ge=1)
    vocab_size: int = Field(-1, le=SIZES["vocab_size"])  # -1: that of the tokenizer, so of the embedding
    multiple_of: int = Field(256, ge=1, le=SIZES["intermediate_size"])
    ffn_dim_multiplier: float | None = Field(None, gt=0, le=64)
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    rope_theta: float = Field(10000.0, gt=0)
    use_scaled_rope: bool = False
    max_seq_len: int | None = None  # of a server, not of the model
    max_batch_size: int | None = None

    @property
    def keys(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def width(self) -> int:
        return _width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @model_validator(mode="after")
    def _fits(self) -> Params:
        if self.n_heads % self.keys or self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"dim {self.dim}, n_heads {self.n_heads}, n_kv_heads {self.keys} do not fit together")
        return self

    def shape(self, theirs: str, vocab: int) -> tuple[int, ...]:
        """Of a whole tensor."""
        dim, width, keys = self.dim, self.width, self.dim // self.n_heads * self.keys
        kinds: dict[str, tuple[int, ...]] = {
            "wk": (keys, dim), "wv": (keys, dim), "w1": (width, dim), "w2": (dim, width), "w3": (width, dim),
            "tok_embeddings": (vocab, dim), "output": (vocab, dim), "norm": (dim,), "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }  # fmt: skip
        return kinds.get(theirs.split(".")[-2], (dim, dim))


def names(layers: int) -> Iterator[tuple[str, str, int | None]]:
    """(Meta's name, transformers' name, the axis along which files share it)."""
    for theirs, (ours, axis) in AROUND.items():
        yield f"{theirs}.weight", f"{ours}.weight", axis
    for layer in range(layers):
        for theirs, (ours, axis) in LAYER.items():
            yield f"layers.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight", axis


def _turned(name: str, weight: Tensor, turn: Callable[[Tensor, int], Tensor], heads: int, kv_heads: int) -> Tensor:
    if ".q_proj." in name:
        return turn(weight, heads)
    return turn(weight, kv_heads) if ".k_proj." in name else weight


# ------------------------------------------------------------------------------------------------------------ from Meta


def import_meta(directory: Path, pieces: Path, out: Path, *, template: str | None = None, seed: int = 0) -> None:
    """Write an ordinary model directory. `template` gives it a chat format by name, with rows for tokens it lacks."""
    params = parse_settings(Params, read_json(directory / "params.json"), str(directory / "params.json"))
    state = read_weights(directory, params)
    config = _config(params, state)
    tokenizer = open_pieces(pieces)
    require_vocabulary(tokenizer, config.vocab_size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if template is not None:
        give_chat(model, tokenizer, seed, template)
    save_model(model, tokenizer, out)


def read_weights(directory: Path, params: Params) -> dict[str, Tensor]:
    """Every tensor whole, under transformers' names and in its order of rotary pairs, in the precision of the files."""
    from safetensors import safe_open

    files = _files(directory)
    headers = [header(path) for path in files]
    wanted = {theirs: (ours, axis) for theirs, ours, axis in names(params.n_layers)}
    for path, found in zip(files, headers, strict=True):
        missing = wanted.keys() - found.keys() - {"output.weight"}  # absent where the head is the embedding
        if odd := sorted(missing) or sorted(found.keys() - wanted.keys() - UNUSED):
            what = "lacks" if missing else "holds beside the weights of LLaMA"
            raise UserError(f"{path}: {what} {', '.join(odd[:3])}; params.json says n_layers {params.n_layers}")
    kept = {theirs: wanted[theirs] for theirs in wanted if theirs in headers[0]}
    table = headers[0]["tok_embeddings.weight"].shape
    if table[-1] == params.dim:  # whole rows: shared by rows, or not shared
        kept["tok_embeddings.weight"] = (kept["tok_embeddings.weight"][0], ROWS)
    vocab = params.vocab_size if params.vocab_size > 0 else table[0] * (len(files) if table[-1] == params.dim else 1)
    for theirs, (_, axis) in kept.items():
        _require_shares(directory, [found.get(theirs) for found in headers], theirs, axis, params.shape(theirs, vocab))
    opened = [safe_open(path, "pt") for path in files]
    state = {}
    for theirs, (ours, axis) in kept.items():
        parts = [file.get_tensor(theirs) for file in opened]
        if axis is WHOLE and not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise UserError(f"{directory}: {theirs} differs between its files, which belong to different models")
        whole = parts[0] if axis is WHOLE or len(parts) == 1 else torch.cat(parts, axis)
        state[ours] = _turned(ours, whole, to_half_split, params.n_heads, params.keys)
    if len({tensor.dtype for tensor in state.values()}) > 1:
        raise UserError(f"{directory}: weights of several precisions: it is quantised, or put together of two models")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return state


def _require_shares(
    directory: Path, entries: Sequence[Entry | None], theirs: str, axis: int | None, whole: tuple[int, ...]
) -> None:
    """Every file holds an equal share of the tensor that params.json makes one expect."""
    share = tuple(n // len(entries) if at == axis else n for at, n in enumerate(whole))
    divides = axis is WHOLE or whole[axis] % len(entries) == 0
    found = {None if entry is None else (entry.shape, entry.dtype) for entry in entries}
    (first, *others) = found
    if others or first is None or first[0] != share or not divides:
        shapes = ", ".join(sorted({"nothing" if entry is None else str(entry.shape) for entry in entries}))
        raise UserError(
            f"{directory}: {theirs} is {shapes} in {len(entries)} files; what params.json says makes {whole} in all"
        )


def _files(directory: Path) -> list[Path]:
    found = {path: FILE.fullmatch(path.name) for path in sorted(directory.iterdir())} if directory.is_dir() else {}
    files = [path for path, match in found.items() if match]
    numbers = [int(match[1] or 0) for match in found.values() if match]
    if not files:
        pickles = sorted(path.name for path in found if path.suffix == ".pth")
        if pickles:
            why = "which can run code: convert them to safetensors elsewhere"
            raise UserError(f"{directory}: only pickles ({pickles[0]}), {why}")
        raise UserError(f"{directory}: no consolidated.00.safetensors")
    if numbers != list(range(len(files))):
        raise UserError(f"{directory}: has consolidated files {numbers}, one of them is missing")
    return files


def _config(params: Params, state: Mapping[str, Tensor]) -> LlamaConfig:
    head, table = state["lm_head.weight"], state["model.embed_tokens.weight"]
    shape: dict[str, Any] = {
        "vocab_size": len(table),
        "hidden_size": params.dim,
        "intermediate_size": params.width,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.keys,
    }
    theta, scaled = params.rope_theta, params.use_scaled_rope
    known = _preset(shape, theta, scaled, params.norm_eps)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaled:
        factor = known.get("rope_parameters", {}).get("factor", 8.0)
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **SCALED}
    return LlamaConfig(
        **shape,
        rms_norm_eps=params.norm_eps,
        max_position_embeddings=known.get("max_position_embeddings", 131072 if scaled else 2048),
        rope_parameters=rope,
        tie_word_embeddings=head is table or torch.equal(head, table),
        dtype=table.dtype,
    )


def _preset(shape: Mapping[str, Any], theta: float, scaled: bool, eps: float) -> Mapping[str, Any]:
    """What a published model of this shape says about itself; {} where there is none."""
    found: Mapping[str, Any] = {}
    for preset in PRESETS.values():
        rope = preset.get("rope_parameters", {})
        base = rope.get("rope_theta", preset.get("rope_theta", 10000.0))
        same = shape.items() <= preset.items() and base == theta and bool(rope) == scaled
        if same and (not found or preset.get("rms_norm_eps", 1e-6) == eps):
            found = preset
    return found


def _width(dim: int, multiple: int, factor: float | None) -> int:
    """Of the feed-forward block (FeedForward in Meta's model.py)."""
    width = int(8 * dim / 3)
    width = width if factor is None else int(factor * width)
    return multiple * -(-width // multiple)


# -------------------------------------------------------------------------------------------------------------- to Meta


def export_meta(directory: Path, out: Path, shards: int = 1) -> None:
    """Write params.json and `shards` consolidated files. UserError for what Meta's layout has no place for."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = _exported(directory, shards)
    found = require_weights(directory, "model", config)
    stored: dict[str, Any] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        file = safe_open(path, "pt")
        stored |= dict.fromkeys(file.keys(), file)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    by_rows = config["vocab_size"] >= 128_000  # Llama 3 shares its embedding by rows
    for shard in range(shards):
        tensors = {}
        for theirs, ours, axis in names(layers):
            tied = ours not in found and theirs == "output.weight"
            name = "model.embed_tokens.weight" if tied else ours
            whole = _turned(ours, stored[name].get_tensor(name), to_interleaved, heads, kv_heads)
            axis = ROWS if theirs == "tok_embeddings.weight" and by_rows else axis
            part = whole if axis is WHOLE else whole.chunk(shards, axis)[shard]
            tensors[theirs] = part.contiguous().clone()
        save_file(tensors, out / f"consolidated.{shard:02}.safetensors", metadata={"format": "pt"})
    (out / "params.json").write_text(json.dumps(_params(config), indent=2) + "\n", encoding="utf-8")


def _exported(directory: Path, shards: int) -> dict[str, Any]:
    where = directory / "config.json"
    if (directory / ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory}: an adapter; Meta's layout holds whole models: merge it first")
    given = read_json(where)
    verdict = check_config(given, str(where))
    why = list(verdict.why) + [key for key in ("attention_bias", "mlp_bias") if given.get(key)]
    if not verdict.core or why:
        raise UserError(f"{where}: Meta's layout holds plain LLaMA; here: {', '.join(why)}")
    config: dict[str, Any] = LlamaConfig.from_dict(given).to_dict()
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UserError(f"{where}: head_dim {config['head_dim']}; in Meta's layout heads share hidden_size evenly")
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3" and {k: rope.get(k) for k in SCALED} != SCALED:
        raise UserError(f"{where}: Meta's layout scales positions by its own constants ({SCALED}), here: {rope}")
    shared = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size", "hidden_size")
    cut = {key: config[key] for key in shared}
    if odd := [f"{key} {value}" for key, value in cut.items() if shards < 1 or value % shards]:
        raise UserError(f"--shards {shards}: does not divide {', '.join(odd)}")
    return config


def _params(config: Mapping[str, Any]) -> dict[str, Any]:
    dim, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rope = config["rope_parameters"]
    width = next((pair for pair in WIDTHS if _width(dim, *pair) == inner), None)
    # any width is int(factor * int(8 dim / 3)) for some factor
    multiple, factor = width or (1, (inner + 0.5) / int(8 * dim / 3))
    params: dict[str, Any] = {"dim": dim, "n_layers": config["num_hidden_layers"], "n_heads": heads}
    if config["num_key_value_heads"] != heads:
        params["n_kv_heads"] = config["num_key_value_heads"]
    params |= {"vocab_size": config["vocab_size"], "multiple_of": multiple}
    params |= {} if factor is None else {"ffn_dim_multiplier": factor}
    params["norm_eps"] = config["rms_norm_eps"]
    if rope["rope_theta"] != 10000.0:
        params["rope_theta"] = rope["rope_theta"]
    return params | ({"use_scaled_rope": True} if rope["rope_type"] == "llama3" else {})
