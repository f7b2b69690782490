"""llama2.c weights: rotary order, checked headers, and the real stories260K against its golden values."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.data.records import Message
from pipeline.flow.errors import UserError
from pipeline.llama.llama2c import (
    import_llama2c,
    load_llama2c,
    read_header,
    read_pieces,
    to_half_split,
    to_interleaved,
)
from pipeline.llama.open import open_policy, open_trainable

WEIGHTS = ("stories260K.bin", "stories260K.v1.bin")


@pytest.fixture(scope="module")
def folder() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights_stories260K"
    if not path.is_dir():
        pytest.skip("no ../shared/data/weights_stories260K beside the checkout")
    return path


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict:
    return json.loads((folder / "golden.dev.json").read_text())


def test_rotary_order_by_hand() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    assert to_half_split(rows, 1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    weight = torch.randn(24, 5)
    assert torch.equal(to_interleaved(to_half_split(weight, 3), 3), weight)


@pytest.mark.parametrize("name", WEIGHTS)
def test_real_weights_reproduce_ids_logits_and_text(name: str, folder: Path, golden: dict) -> None:
    model, tokenizer = load_llama2c(folder / name, folder / "tok512.bin")
    assert sum(p.numel() for p in model.parameters()) == golden["params"] == 260_032
    with torch.no_grad():
        for case in golden["cases"]:
            ids = tokenizer(case["text"]).input_ids
            assert ids == case["ids"]
            logits = model(torch.tensor([ids])).logits[0]
            assert (logits[-1] - torch.tensor(case["last_logits"])).abs().max() <= 2e-5
            assert logits[-1].topk(10).indices.tolist() == case["top10"]
            logp = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert (logp - torch.tensor(case["token_logprobs"])).abs().max() <= 1e-5
        for case in golden["greedy"]:
            count = len(case["output_ids"]) - len(case["prompt_ids"])
            written = model.generate(
                torch.tensor([case["prompt_ids"]]), max_new_tokens=count, do_sample=False, eos_token_id=1
            )[0].tolist()
            assert written == case["output_ids"]
            assert tokenizer.decode(written, skip_special_tokens=True) == case["text"]


def test_both_versions_hold_the_same_weights(folder: Path) -> None:
    a, b = (load_llama2c(folder / name, folder / "tok512.bin")[0].state_dict() for name in WEIGHTS)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_tokenizer_equals_sentencepiece(folder: Path, golden: dict) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(str(folder / "tok512.model"))
    _, ours = load_llama2c(folder / WEIGHTS[0], folder / "tok512.bin")
    words = golden["upstream_golden_greedy_200_from_bos"].split()
    texts = [" ".join(words[i : i + 1 + i % 9]) for i in range(len(words) - 9)] + [
        "café 日本 🙂",
        "a\nb",
        "1,234!",
    ]
    for text in texts:
        if "\n" not in text:
            assert ours(text, add_special_tokens=False).input_ids == theirs.encode(text), text
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


def test_the_import_is_an_ordinary_directory_and_a_chain_can_start_from_it(folder, golden, tmp_path) -> None:
    import_llama2c(folder / WEIGHTS[0], folder / "tok512.bin", tmp_path / "plain")
    opened = open_policy(SimpleNamespace(path=tmp_path / "plain", digest="d", bases={}))
    assert opened.record["implementation"] == "core"
    case = golden["cases"][0]
    logits = opened.model(torch.tensor([opened.tokenizer(case["text"]).input_ids])).logits[0, -1]
    assert (logits - torch.tensor(case["last_logits"])).abs().max() <= 2e-5
    import_llama2c(folder / WEIGHTS[0], folder / "tok512.bin", tmp_path / "chat", chat=True)
    start = open_trainable(SimpleNamespace(path=tmp_path / "chat", digest="d", bases={}), None, seed=0)
    ids = start.chat.prompt_ids([Message("user", "Hi <|user|>")])
    assert ids[0] == 1 and max(ids) < start.model.config.vocab_size == len(start.tokenizer)
    assert torch.equal(start.model.get_input_embeddings().weight[:512], opened.model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", WEIGHTS)
def test_headers_are_checked(name: str, folder: Path, tmp_path: Path) -> None:
    data = (folder / name).read_bytes()
    path = tmp_path / "weights.bin"
    first = 8 if "v1" in name else 0
    cases = {
        "cut short": (data[:-4], "bytes, its header"),
        "too long": (data + b"\0" * 4, "bytes, its header"),
        "cut in the header": (data[:20], "ends inside its header"),
        "absurd dim": (data[:first] + struct.pack("<i", 1 << 30) + data[first + 4 :], "dim 1073741824"),
        "odd heads": (data[: first + 12] + struct.pack("<i", 7) + data[first + 16 :], "do not fit"),
    }
    if "v1" in name:
        cases["version 2"] = (data[:4] + struct.pack("<i", 2) + data[8:], "version 2")
    for content, words in cases.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_header(path)


def test_tokenizer_files_are_checked(folder: Path, tmp_path: Path) -> None:
    data = (folder / "tok512.bin").read_bytes()
    path = tmp_path / "tokenizer.bin"
    assert len(read_pieces(folder / "tok512.bin", 512)) == 512
    size = np.frombuffer(data, "<i4", 1, 8)
    assert size == 5
    for content, count in (
        (data[:-3], 512),
        (data, 511),
        (data, 513),
        (data[:8] + b"\xff" * 4 + data[12:], 512),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="llama2.c tokenizer"):
            read_pieces(path, count)
