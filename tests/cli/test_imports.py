"""`rlhf import`: a directory whole or not at all, and refusals that say what to do."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.exports import app as exports
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


# Meta's layout, tokenizers


def run(app: Any, *args: object) -> Any:
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def stored(weights: Path, tokenizer: Path, tmp_path: Path) -> Path:
    """A model directory without a chat template."""
    call(weights, tokenizer, tmp_path / "stored")
    return tmp_path / "stored"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    path = tmp_path / "ranks.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + f" {b}\n".encode() for b in range(256)))
    return path


def test_metas_layout_goes_out_and_comes_in_again(stored: Path, ranks: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out, back = tmp_path / "meta", tmp_path / "back"
    result = run(exports, "meta", stored, out)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"params.json", "consolidated.00.safetensors"}
    with pytest.raises(UserError, match="there is no file .*tokenizer.model; name the tokenizer with --tokenizer"):
        raise run(app, "meta", out, back).exception
    with pytest.raises(UserError, match="makes ids up to 511, the model's embedding has 260 rows"):
        raise run(app, "meta", out, back, "--tokenizer", ranks).exception
    with pytest.raises(UserError, match="does not divide num_key_value_heads 1"):
        raise run(exports, "meta", stored, back, "--shards", 2).exception
    with pytest.raises(UserError, match="holds no model"):
        raise run(exports, "meta", out, back).exception
    assert not back.exists()
    pieces = tmp_path / "pieces.json"
    shutil.copy(stored / "tokenizer.json", pieces)
    with pytest.raises(UserError, match="does not say which token ends a text"):
        raise run(app, "meta", out, back, "--tokenizer", pieces).exception
    result = run(app, "meta", out, back, "--tokenizer", stored / "tokenizer.json")
    assert result.exit_code == 0, result.output
    assert "sft.template" in result.stdout
    ours, again = (load_file(path / "model.safetensors") for path in (stored, back))
    assert ours.keys() == again.keys() and all(again[key].equal(ours[key]) for key in ours)


def test_a_tokenizer_is_imported_with_its_chat_format(ranks: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "pieces"
    result = run(app, "tokenizer", ranks, out, "--template", "llama-3")
    assert result.exit_code == 0, result.output
    assert f"{{kind: tokenizer, path: {out}}}" in result.stdout and "no chat template" not in result.stdout
    opened = AutoTokenizer.from_pretrained(out)
    ids = opened.apply_chat_template([{"role": "user", "content": " a "}], return_dict=True)["input_ids"]
    assert ids == [256, 262, *b"user", 263, *b"\n\na", 265]
    assert "--template" in run(app, "tokenizer", ranks, tmp_path / "plain").stdout
    with pytest.raises(UserError, match="'llama3' is not known; did you mean 'llama-3'"):
        raise run(app, "tokenizer", ranks, tmp_path / "x", "--template", "llama3").exception
    with pytest.raises(UserError, match="names its own bos, eos and pad"):
        raise run(app, "tokenizer", ranks, tmp_path / "x", "--eos", "x").exception


def test_a_model_is_given_a_format_by_name(stored: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    result = run(app, "chat", stored, tmp_path / "chat", "--template", "llama-2")
    assert result.exit_code == 0, result.output
    assert "[INST]" in AutoTokenizer.from_pretrained(tmp_path / "chat").chat_template
