"""Weight files of strangers: what their headers may say, and a config that fits them."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.flow.errors import UserError
from pipeline.llama.weights import Entry, header, require_weights

TENSORS = {
    "model.embed_tokens.weight": torch.zeros(5, 4),
    "model.layers.0.norm.weight": torch.ones(4),
    "model.layers.1.norm.weight": torch.ones(4, dtype=torch.bfloat16),
}
CONFIG = {"model_type": "llama", "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 2}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path: Path, table: Any, data: bytes = b"", length: int | None = None) -> None:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_a_good_file_tells_what_it_holds(file: Path) -> None:
    found = require_weights(file.parent, "model", CONFIG)
    assert found["model.embed_tokens.weight"] == Entry("F32", (5, 4)) and len(found) == 3
    assert found["model.layers.1.norm.weight"] == Entry("BF16", (4,))


def one(**facts: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **facts}}


@pytest.mark.parametrize(
    ("table", "data", "told"),
    [
        (one(), b"1234567", "accounts for 8 bytes of data, and there are 7"),
        (one(), b"123456789", "accounts for 8 bytes of data, and there are 9"),
        (one(shape=[3]), b"12345678", "the entry of 'a' makes no sense"),
        (one(shape=[-2]), b"12345678", "makes no sense"),
        (one(shape=[2**61, 2**61]), b"12345678", "makes no sense"),
        (one(dtype="F12"), b"12345678", "makes no sense"),
        (one(data_offsets=[8, 0]), b"12345678", "makes no sense"),
        (one(data_offsets=[4, 12]), b"123456789012", "overlap, or leave a gap, at byte 0"),
        (one(extra=1), b"12345678", "makes no sense"),
        ([1], b"", "no JSON object"),
        (b"{", b"", "names a header of 1"),
        (b"{]", b"", "no JSON object"),
        (b"[" * 5000, b"", "no JSON object"),
        (b'{"a":1,"a":2}', b"", "a key stands twice"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, table: Any, data: bytes, told: str) -> None:
    write(tmp_path / "model.safetensors", table, data)
    with pytest.raises(UserError, match="model.safetensors") as error:
        require_weights(tmp_path, "model")
    assert told in str(error.value) and "expected a whole safetensors file" in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**40, 10_000])
def test_a_length_beyond_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    write(tmp_path / "model.safetensors", one(), b"12345678", length)
    with pytest.raises(UserError, match=f"names a header of {length}"):
        header(tmp_path / "model.safetensors")


def test_pickles_are_known_by_content(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="a pickle under another name"):
        header(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="a pickle under another name"):
        header(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"num_hidden_layers": 10**9}, "the weights have 2"), ({"vocab_size": 10**12}, "the embedding is"),
     ({"hidden_size": 8}, "the embedding is")],
)  # fmt: skip
def test_a_config_that_asks_for_more_than_there_is(file: Path, change: dict[str, int], told: str) -> None:
    with pytest.raises(UserError, match="config.json") as error:
        require_weights(file.parent, "model", CONFIG | change)
    assert told in str(error.value)


def test_shards_are_those_that_the_index_names(file: Path) -> None:
    save_file({"a": torch.zeros(2)}, file.with_name("model.fp16.safetensors"))
    assert "a" not in require_weights(file.parent, "model")  # a variant beside it is not read
    file.rename(file.with_name("model-1.safetensors"))
    index = file.with_name("model.safetensors.index.json")
    with pytest.raises(UserError, match="no weights"):
        require_weights(file.parent, "model")
    index.write_text(json.dumps({"weight_map": {"a": "model.fp16.safetensors", "b": "model-1.safetensors"}}))
    assert len(require_weights(file.parent, "model")) == 4
    save_file({"a": torch.zeros(2)}, file.with_name("model-1.safetensors"))
    with pytest.raises(UserError, match=r"model.fp16.safetensors: holds a, which another file"):
        require_weights(file.parent, "model")
    for bad in (
        "[]",
        "{",
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "/etc/x.safetensors"}}',
        '{"weight_map": {"a": "a\\u0000.safetensors"}}',
        '{"weight_map": [["a"]]}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": {}}',
    ):
        index.write_text(bad)
        with pytest.raises(UserError, match="index.json"):
            require_weights(file.parent, "model")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path, length: int) -> None:
    """0x0280 and the like: 80 02 are also a pickle's first bytes."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    write(tmp_path / "model.safetensors", text + b" " * (length - len(text)), b"x")
    assert header(tmp_path / "model.safetensors") == {"a": Entry("U8", (1,))}


def test_what_a_config_need_not_say(file: Path) -> None:
    """Fewer layers than the weights (prediction layers of some families), embeddings of another width."""
    require_weights(file.parent, "model", {**CONFIG, "num_hidden_layers": 1})
    require_weights(file.parent, "model", {**CONFIG, "model_type": "opt", "hidden_size": 8})


@pytest.mark.parametrize("examples", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_whatever_a_file_holds_it_opens_or_is_refused(file: Path, examples: int) -> None:
    """Random bytes, and one change to a good file: cut, byte changed, bytes put in."""
    good = file.read_bytes()

    @settings(max_examples=examples, deadline=1000, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.one_of(
            st.binary(max_size=200),
            st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)).map(
                lambda c: good[: c[0]] + bytes([c[1]]) + good[c[0] + 1 :]
            ),
            st.integers(0, len(good)).map(lambda n: good[:n]),
            st.tuples(st.integers(0, len(good)), st.binary(max_size=9)).map(
                lambda c: good[: c[0]] + c[1] + good[c[0] :]
            ),
        )
    )
    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            found = require_weights(file.parent, "model", CONFIG)
        except UserError as error:
            assert str(file.parent) in str(error)
            return
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:  # what we let through the library opens as well
            assert set(opened.keys()) == set(found)

    check()
