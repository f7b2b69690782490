"""`rlhf import`: a directory whole or not at all, and refusals that say what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.imports import app
from pipeline.flow.errors import UserError

PIECES = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), b"a"]


def call(*args: object) -> Any:
    return CliRunner().invoke(app, ["llama2c", *map(str, args)])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Version 0, tied: dim 8, hidden 4, one layer, two heads, one kv head, the vocabulary of PIECES, 16 positions."""
    dim, hidden, heads, kv_heads, vocab, longest = 8, 4, 2, 1, len(PIECES), 16
    attention = 2 * dim * dim + 2 * dim * (dim // heads) * kv_heads
    count = vocab * dim + 2 * dim + attention + 3 * dim * hidden + dim + longest * (dim // heads)
    path = tmp_path / "weights.bin"
    header = struct.pack("<7i", dim, hidden, 1, heads, kv_heads, vocab, longest)
    path.write_bytes(header + np.linspace(-0.1, 0.1, count, dtype="<f4").tobytes())
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tok.bin"
    pieces = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in PIECES)
    path.write_bytes(struct.pack("<i", max(map(len, PIECES))) + pieces)
    return path


def test_an_import_is_a_policy_that_opens(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "models" / "tiny"
    result = call(weights, tokenizer, out, "--chat")
    assert result.exit_code == 0, result.output
    assert f"sources.base.path={out}" in result.stdout and "no chat template" not in result.stdout
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 1
    model, pieces = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(pieces) == model.config.vocab_size > len(PIECES) and pieces.chat_template
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_without_chat_it_says_what_it_lacks(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    result = call(weights, tokenizer, tmp_path / "plain")
    assert result.exit_code == 0 and "--chat" in result.stdout
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()


def test_refusals_leave_nothing_behind(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ((tmp_path / "none.bin", tokenizer, out), "there is no file"),
        ((tokenizer, weights, out), "no llama2.c file"),
        ((weights, tokenizer, tmp_path), "not an empty directory"),
        ((weights, tokenizer, weights), "not an empty directory"),
    ):
        with pytest.raises(UserError, match=message):
            raise call(*arguments).exception
    assert {path.name for path in tmp_path.iterdir()} == {"weights.bin", "tok.bin"}


def test_a_model_without_a_chat_template_is_given_one(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, out = tmp_path / "plain", tmp_path / "chat"
    call(weights, tokenizer, plain)
    result = CliRunner().invoke(app, ["chat", str(plain), str(out)])
    assert result.exit_code == 0, result.output
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (plain, out))
    pieces, old = AutoTokenizer.from_pretrained(out), before.config.vocab_size
    assert pieces.chat_template and after.config.vocab_size == len(pieces) > old
    assert after.get_input_embeddings().weight[:old].equal(before.get_input_embeddings().weight)
    assert after.generation_config.eos_token_id[0] == pieces.convert_tokens_to_ids("<|end|>")
    for arguments, message in (
        (["chat", out, plain], "not an empty"),
        (["chat", tmp_path, out / "x"], "no config.json"),
    ):
        with pytest.raises(UserError, match=message):
            raise CliRunner().invoke(app, list(map(str, arguments))).exception
    with pytest.raises(UserError, match="chat template of its own"):
        raise CliRunner().invoke(app, ["chat", str(out), str(tmp_path / "twice")]).exception
    assert not (tmp_path / "twice").exists()
