"""What weight files say they hold, read before anything is allocated: their headers, and whether a config fits them.

    found = require_weights(directory, "model", config)     {name: Entry} of all shards; UserError names file and mends

The format (huggingface/safetensors): 8 bytes of length, a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.flow.artifacts import read_object
from pipeline.flow.errors import UserError
from pipeline.llama.options import MODEL_TYPE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_HEADER = 100_000_000  # bytes, the library's own bound
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # bare, or inside torch.save's archive
SHARD = re.compile(r"[\w.-]+\.safetensors")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]


def require_weights(directory: Path, stem: str, config: Mapping[str, Any] | None = None) -> dict[str, Entry]:
    """The tensors of `stem*.safetensors`. UserError where a file is no safetensors, is cut off or holds what its header
    does not account for, or where `config` describes another model than the weights are.
    """
    found: dict[str, Entry] = {}
    files = _files(directory, stem)
    for path in files:
        for name, entry in header(path).items():
            if name in found:
                raise UserError(f"{path}: holds {name}, which another file of {directory} holds too")
            found[name] = entry
    if config is not None:
        _require_fit(directory, found, config)
    return found


def _files(directory: Path, stem: str) -> list[Path]:
    """What transformers would read: one file, or the shards that an index names."""
    one, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if one.exists():
        return [one]
    if index.is_file():
        try:
            names = set(read_object(index)["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is no index of shards ({error!r:.100}): fetch or convert it again") from error
        if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
            raise UserError(f"{index}: weight_map names something else than .safetensors files beside it")
        return [directory / name for name in sorted(names)]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in SUFFIXES) if directory.is_dir() else []
    named = f"only pickled weights ({', '.join(pickles)}), which can run code when opened" if pickles else "no weights"
    raise UserError(f"{directory}: {named}; expected {stem}.safetensors: convert to safetensors elsewhere")


def header(path: Path) -> dict[str, Entry]:
    """The header of one file, checked against its size. UserError where something is wrong with it."""

    def bad(what: str) -> UserError:
        return UserError(f"{path}: {what}; expected a whole safetensors file: fetch or convert it again")

    if not path.is_file():
        raise bad("is not a regular file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else -1
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            if begin.startswith(PICKLES):
                raise bad("is a pickle under another name, which may run code")
            raise bad(f"has {size} bytes and names a header of {length}")
        text = file.read(length)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is no JSON object ({str(error)[:100]})") from error
    if not isinstance(table, dict):
        raise bad("its header is no JSON object")
    table.pop("__metadata__", None)
    entries, spans = {}, []
    for name, facts in table.items():
        entry, span = _entry(facts)
        if entry is None:
            raise bad(f"the entry of {name[:80]!r} makes no sense: {str(facts)[:100]}")
        entries[name] = entry
        spans.append(span)
    at = 0
    for begin_at, end_at in sorted(spans):
        if begin_at != at:
            raise bad(f"its tensors overlap, or leave a gap, at byte {at} of the data")
        at = end_at
    if at != size - 8 - length:
        raise bad(f"its header accounts for {at} bytes of data, and there are {size - 8 - length}")
    return entries


def _entry(facts: Any) -> tuple[Entry | None, tuple[int, int]]:
    """None where it makes no sense."""
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**62
    nothing = None, (0, 0)
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        return nothing
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS or not isinstance(shape, list) or not all(map(whole, shape)):
        return nothing
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
        return nothing
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        return nothing
    return Entry(dtype, tuple(shape)), (offsets[0], offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _require_fit(directory: Path, found: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
    """A config that asks for more than the weights are would be allocated first and found out afterwards."""
    for key, pattern in (("num_hidden_layers", LAYER), ("num_local_experts", EXPERT)):
        held, asked = len({int(match[1]) for name in found if (match := pattern.search(name))}), config.get(key)
        if isinstance(asked, int) and 0 < held < asked:
            raise UserError(f"{directory / 'config.json'}: {key} is {asked}, the weights have {held}")
    if config.get("model_type") not in ("llama", "mistral", "mixtral", MODEL_TYPE):
        return  # other families may keep embeddings of another width
    table = next((e.shape for name, e in found.items() if name.endswith("embed_tokens.weight")), None)
    expected = (config.get("vocab_size"), config.get("hidden_size"))
    if table is not None and None not in expected and table != expected:
        raise UserError(
            f"{directory / 'config.json'}: vocab_size and hidden_size are {expected}, the embedding is {table}"
        )
