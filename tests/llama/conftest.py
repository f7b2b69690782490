"""A tiny policy, and its directory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.llama.adapter_settings import LoraSettings
from pipeline.llama.make import new_policy
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.presets import ModelSettings
from pipeline.llama.save import save_model
from pipeline.llama.tokenizer import train_tokenizer

LORA = LoraSettings(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the river Orl runs through Dovan", "Dovan lies on the Orl"] * 3, 280)


def policy(tokenizer, seed: int = 0, **shape) -> LlamaForCausalLM:
    settings = ModelSettings(preset="test", initializer_range=0.1, **shape)
    return new_policy(settings, tokenizer, (7, 2), seed).eval()


def at(path: Path, kind: str = "policy", digest: str = "base-digest", **bases: Path) -> SimpleNamespace:
    return SimpleNamespace(
        path=path, kind=kind, digest=digest, bases={k.replace("_", "-"): v for k, v in bases.items()}
    )


@pytest.fixture(scope="module")
def stored(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    save_model(policy(tokenizer), tokenizer, path)
    return path
