"""Models written: the same bytes for the same weights, and nothing that is not whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from pipeline.flow.errors import Damaged
from pipeline.llama.open import open_trainable
from pipeline.llama.save import save_model
from tests.llama.conftest import LORA, at, policy


def test_adapters_saved_twice_have_the_same_bytes(stored, tmp_path, tokenizer) -> None:
    for name in ("one", "two"):
        trainable = open_trainable(at(stored), LORA, seed=0)
        save_model(trainable.model, tokenizer, tmp_path / name, base_digest="base-digest")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) == 7


def test_what_was_not_gathered_is_not_saved_silently(tmp_path, tokenizer) -> None:
    model = policy(tokenizer)
    hollow = {k: torch.empty(0) for k in model.state_dict()}
    with pytest.raises(Damaged, match="saved empty"):
        save_model(model, tokenizer, tmp_path / "a", state=hollow)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(Damaged, match="model.norm.weight.*not finite"):
        save_model(model, tokenizer, tmp_path / "b")
    with pytest.raises(ValueError, match="digest of its base"):
        save_model(SimpleNamespace(get_base_model=None), tokenizer, tmp_path / "c")
