"""`rlhf export`: a directory whole or not at all; what comes in again is tested with the imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.cli import main
from pipeline.cli.exports import _write_merged, app
from pipeline.flow.errors import UserError
from pipeline.llama.adapter_settings import LoraSettings, PromptSettings
from pipeline.llama.open import open_policy, open_trainable
from tests.small import policy, save


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "policy", policy().model).path


def test_files_are_ranks_of_tensor_parallelism(stored: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["meta", str(stored), str(tmp_path / "meta"), "--shards", "2"])
    assert result.exit_code == 0 and "2 consolidated files" in result.stdout
    files = sorted(path.name for path in (tmp_path / "meta").iterdir())
    assert files == ["consolidated.00.safetensors", "consolidated.01.safetensors", "params.json"]
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert (params["dim"], params["n_heads"], params["n_kv_heads"], params["vocab_size"]) == (32, 4, 2, 264)
    first = load_file(tmp_path / "meta" / files[0])
    shapes = {name: tuple(first[f"layers.1.attention.{name}.weight"].shape) for name in ("wq", "wk", "wo")}
    assert shapes == {"wq": (16, 32), "wk": (8, 32), "wo": (32, 16)}
    assert first["output.weight"].shape == (132, 32) and first["tok_embeddings.weight"].shape == (264, 16)


def test_a_refusal_is_one_message_and_leaves_nothing(stored: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, words in (
        ((stored, tmp_path / "out", "--shards", "8"), "--shards 8: does not divide num_key_value_heads 2"),
        ((stored, stored), "not an empty directory"),
        ((tmp_path, tmp_path / "out"), "holds no model (no config.json)"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", "meta", *map(str, arguments)])
        assert ended.value.code == 2
        assert words in (said := capsys.readouterr().err) and "Traceback" not in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("beneath", [None, "same", "merge", "stack"])
def test_a_merged_policy_is_its_base_with_every_adapter_added(tmp_path: Path, beneath: Any) -> None:
    """Beside the README's `from_pretrained`: transformers alone opens it, and computes what the policy computes."""
    from transformers import AutoModelForCausalLM

    given = save(tmp_path / "base", "policy", policy().model)
    for i in range({None: 0, "same": 1}.get(beneath, 2)):
        made = open_trainable(given, LoraSettings(rank=2, beneath=beneath), seed=i)
        for number, weight in enumerate(made.model.parameters()):
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
        given = save(tmp_path / str(i), "policy", made.model, given)
    words = _write_merged(given, tmp_path / "out", "run sft")
    assert words == ("which was whole already" if beneath is None else "merged")
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[5, 9, 17, 3]])
    logits = [model.eval()(input_ids=ids).logits for model in (plain, open_policy(given).model)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_virtual_tokens_are_not_merged(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "policy", policy().model)
    made = open_trainable(base, PromptSettings(kind="prompt", tokens=2), seed=0)
    with pytest.raises(UserError, match="run sft: its adapter is virtual tokens"):
        _write_merged(save(tmp_path / "made", "policy", made.model, base), tmp_path / "out", "run sft")
