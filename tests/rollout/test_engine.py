from __future__ import annotations

import importlib.util
import subprocess
import sys

import pydantic
import pytest
import torch

from pipeline.flow.errors import UserError
from pipeline.rollout.engine import EngineSettings, SamplingSettings, new_engine
from pipeline.rollout.native import NativeEngine


def test_settings_agree_with_each_other():
    with pytest.raises(pydantic.ValidationError, match="lower min_new_tokens"):
        SamplingSettings(max_new_tokens=4, min_new_tokens=4)
    with pytest.raises(pydantic.ValidationError, match="every text holds"):
        SamplingSettings(stop_strings=["a", ""])
    with pytest.raises(pydantic.ValidationError, match="text cannot be barred"):
        SamplingSettings(stop_strings=["a"], min_new_tokens=2)
    with pytest.raises(pydantic.ValidationError, match="set temperature 0"):
        SamplingSettings(num_beams=2)
    with pytest.raises(pydantic.ValidationError, match="raise num_beams"):
        SamplingSettings(temperature=0, num_beams=2, samples=3)
    with pytest.raises(pydantic.ValidationError, match="leave it out"):
        EngineSettings(engine="vllm", precision="bfloat16")
    out_of_range = ({"temperature": -1}, {"top_p": 0.0}, {"min_p": 1.1}, {"repetition_penalty": 0.0})
    for wrong in (
        *out_of_range,
        {"samples": 0},
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"early_stopping": "sometimes"},
    ):
        with pytest.raises(pydantic.ValidationError):
            SamplingSettings(**wrong)


CUTS = [
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"repetition_penalty": 1.1},
    {"min_new_tokens": 1},
    {"temperature": 0.0},
    {"temperature": 0.0, "num_beams": 2},
]


@pytest.mark.parametrize("change", CUTS, ids=str)
def test_whether_logprobs_are_those_of_the_policy(change):
    assert not SamplingSettings(temperature=0.7, stop_strings=("x",), max_new_tokens=9, samples=3).truncated
    assert SamplingSettings(**change).truncated


def test_memory_is_not_identity():
    """Samples do not depend on how many are drawn at once; they do on the engine and on the precision."""
    one = EngineSettings(rows=8, cache_gib=0.5, vllm={"server_url": "http://elsewhere"})
    assert one.identity() == EngineSettings().identity()
    assert EngineSettings(precision="bfloat16").identity() != EngineSettings().identity()
    assert EngineSettings(engine="vllm").identity() != EngineSettings().identity()


def test_settings_import_no_torch():
    code = "import sys, pipeline.rollout.engine; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_native_engine_is_made_as_asked():
    model = torch.nn.Linear(1, 1)
    settings = EngineSettings(rows=7, cache_gib=0.5, precision="bfloat16")
    engine = new_engine(settings, model, [2], 0, to_text=list)
    assert isinstance(engine, NativeEngine)
    assert (engine.rows, engine.cache_bytes, engine.linear_dtype) == (7, 1 << 29, torch.bfloat16)
    assert (engine.model, engine.stop_ids, engine.pad_id, engine.to_text) == (model, (2,), 0, list)
    assert new_engine(EngineSettings(), model, [2], 0).linear_dtype is None


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_absent_vllm_is_said():
    with pytest.raises(UserError, match=r"vLLM is not installed.*rlhf-pipeline\[vllm\].*native"):
        new_engine(EngineSettings(engine="vllm"), torch.nn.Linear(1, 1), [2], 0)
