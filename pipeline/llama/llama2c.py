"""Weights of karpathy/llama2.c, an explicit import kind: a checked header, then raw float32.

    import_llama2c(weights, tokenizer, directory)        -> an ordinary Hugging Face directory

    version 0   seven int32 (dim, hidden_dim, layers, heads, kv_heads, vocab, max_len; a negative vocab says that the
                head is not tied), then tensors, embedding first, rotary tables (not used) before the head
    version 1   magic 0x616b3432, int32 version, the seven, a byte for tied, zeros up to 256 bytes, then tensors,
                norms first
    tokenizer   int32 longest piece, then for each piece float32 score, int32 bytes, the bytes

llama2.c turns pairs (2i, 2i + 1) of a head, transformers (i, i + h): rows of queries and keys are reordered.
Byte order is little-endian. Sizes must account for every byte of the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from pipeline.flow.errors import UserError
from pipeline.llama.make import give_chat
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.save import save_model

MAGIC = b"24ka"  # 0x616b3432, little-endian
Named = tuple[str, tuple[int, ...]]
HEADER = struct.Struct("<7i")
UNK, BOS, EOS = 0, 1, 2
_MOST = {
    "dim": 1 << 16,
    "hidden_dim": 1 << 18,
    "layers": 512,
    "heads": 1024,
    "kv_heads": 1024,
    "vocab": 1 << 20,
}


@dataclass(frozen=True)
class Header:
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    max_len: int
    tied: bool
    version: int
    start: int  # byte of the first tensor

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def read_header(path: Path) -> Header:
    """Raises UserError naming what is wrong with the header or the file's size."""
    with path.open("rb") as file:
        first = file.read(256)
    if first[:4] == MAGIC:
        if len(first) < 256:
            raise UserError(f"{path}: ends inside its header of 256 bytes")
        (version,) = struct.unpack_from("<i", first, 4)
        if version != 1:
            raise UserError(f"{path}: llama2.c version {version}; versions 0 and 1 (float32) can be read")
        numbers, tied, start = HEADER.unpack_from(first, 8), bool(first[36]), 256
    else:
        if len(first) < HEADER.size:
            raise UserError(f"{path}: ends inside its header of {HEADER.size} bytes: no llama2.c file")
        numbers, version, start = HEADER.unpack_from(first, 0), 0, HEADER.size
        tied = numbers[5] > 0
        numbers = (*numbers[:5], abs(numbers[5]), numbers[6])
    dim, hidden, layers, heads, kv_heads, vocab, longest = numbers
    header = Header(dim, hidden, layers, heads, kv_heads, vocab, longest, tied, version, start)
    _check(header, path)
    return header


def _check(header: Header, path: Path) -> None:
    for name, most in _MOST.items():
        if not 1 <= getattr(header, name) <= most:
            raise UserError(f"{path}: the header says {name} {getattr(header, name)}: no llama2.c file")
    if header.dim % header.heads or header.heads % header.kv_heads or header.head_dim % 2 or header.max_len < 1:
        raise UserError(f"{path}: the header's sizes do not fit together ({header}): no llama2.c file")
    floats = sum(int(np.prod(shape)) for _, shape in _tensors(header))
    found, expected = path.stat().st_size, header.start + 4 * floats
    if found != expected:
        raise UserError(f"{path}: {found} bytes, its header ({header}) asks for {expected}")


def _tensors(header: Header) -> list[Named]:
    """(name, shape) in file order. A name with {} holds all layers, one after another."""
    d, f, n = header.dim, header.hidden_dim, header.layers
    kv = header.kv_heads * header.head_dim
    embedding: list[Named] = [("model.embed_tokens.weight", (header.vocab, d))]
    norm_in: list[Named] = [("model.layers.{}.input_layernorm.weight", (n, d))]
    norm_mlp: list[Named] = [("model.layers.{}.post_attention_layernorm.weight", (n, d))]
    norm_out: list[Named] = [("model.norm.weight", (d,))]
    attention: list[Named] = [
        ("model.layers.{}.self_attn.q_proj.weight", (n, d, d)),
        ("model.layers.{}.self_attn.k_proj.weight", (n, kv, d)),
        ("model.layers.{}.self_attn.v_proj.weight", (n, kv, d)),
        ("model.layers.{}.self_attn.o_proj.weight", (n, d, d)),
    ]
    mlp: list[Named] = [
        ("model.layers.{}.mlp.gate_proj.weight", (n, f, d)),
        ("model.layers.{}.mlp.down_proj.weight", (n, d, f)),
        ("model.layers.{}.mlp.up_proj.weight", (n, f, d)),
    ]
    head: list[Named] = [] if header.tied else [("lm_head.weight", (header.vocab, d))]
    if header.version == 1:
        return norm_in + norm_mlp + norm_out + embedding + attention + mlp + head
    tables: list[Named] = [("rotary cos, not used", (header.max_len, header.head_dim // 2))]
    tables += [("rotary sin, not used", (header.max_len, header.head_dim // 2))]
    return embedding + norm_in + attention + norm_mlp + mlp + norm_out + tables + head


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (2i, 2i + 1) to (i, i + h): order 0 2 4 6 1 3 5 7 for a head of 8."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The way back."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_weights(path: Path, header: Header) -> dict[str, Tensor]:
    """Tensors under transformers' names, rotary order included."""
    flat = np.fromfile(path, dtype="<f4", offset=header.start)
    state: dict[str, Tensor] = {}
    at = 0
    for name, shape in _tensors(header):
        count = int(np.prod(shape))
        tensor = torch.from_numpy(flat[at : at + count].astype(np.float32)).view(shape)
        at += count
        if "{}" in name:
            for layer in range(header.layers):
                state[name.format(layer)] = tensor[layer].clone()
        elif name.endswith(".weight"):
            state[name] = tensor
    for key, weight in state.items():
        if ".q_proj." in key:
            state[key] = to_half_split(weight, header.heads)
        elif ".k_proj." in key:
            state[key] = to_half_split(weight, header.kv_heads)
    return state


def read_pieces(path: Path, count: int) -> list[tuple[str, float]]:
    """(piece, score) by id, SentencePiece's "▁" put back for spaces. Raises UserError for any byte out of place."""
    data = path.read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4
    try:
        for _ in range(count):
            score, size = struct.unpack_from("<fi", data, at)
            if not 0 <= size <= len(data) - at - 8:
                raise UserError(f"{path}: a piece of {size} bytes at byte {at}: no llama2.c tokenizer")
            pieces.append((data[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁"), score))
            at += 8 + size
    except (struct.error, UnicodeDecodeError) as problem:
        raise UserError(f"{path}: no llama2.c tokenizer of {count} pieces: {problem}") from problem
    if at != len(data):
        raise UserError(
            f"{path}: {len(data) - at} bytes behind its {count} pieces: no llama2.c tokenizer of this model"
        )
    return pieces


def make_tokenizer(pieces: list[tuple[str, float]], longest: int) -> Any:
    """SentencePiece BPE with byte fallback as a fast tokenizer: a leading space, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [name for name, _ in pieces]
    names[UNK], names[BOS], names[EOS] = "<unk>", "<s>", "</s>"
    for i in range(3, 259):
        names[i] = f"<0x{i - 3:02X}>"
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for i in range(259, len(names)):
        piece = names[i]
        splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        known = [(a, b) for a, b in splits if a in ids and b in ids]
        # SentencePiece joins the pair whose piece scores best; among ways to the same piece the order is by parts.
        merges += [(-pieces[i][1], ids[a], ids[b], a, b) for a, b in known]
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(a, b) for *_, a, b in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def load_llama2c(weights: Path, tokenizer: Path) -> tuple[LlamaForCausalLM, Any]:
    """The model and its tokenizer, nothing written. Epsilon and theta are llama2.c's constants."""
    header = read_header(weights)
    config = LlamaConfig(
        vocab_size=header.vocab,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.max_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=header.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    state = read_weights(weights, header)
    if header.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval(), make_tokenizer(read_pieces(tokenizer, header.vocab), header.max_len)


def import_llama2c(weights: Path, tokenizer: Path, directory: Path, *, chat: bool = False, seed: int = 0) -> None:
    """Write an ordinary model directory. `chat` adds this project's chat template and turn tokens, with new rows."""
    model, pieces = load_llama2c(weights, tokenizer)
    if chat:
        give_chat(model, pieces, seed)
    save_model(model, pieces, directory)
