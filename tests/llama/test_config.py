"""What a config.json may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from pipeline.flow.errors import UserError
from pipeline.llama.config import check_config, read_json

PLAIN = json.loads(LlamaConfig(vocab_size=97, hidden_size=32, num_attention_heads=4).to_json_string(use_diff=False))


def test_our_own_configs_are_for_the_core() -> None:
    verdict = check_config(PLAIN)
    assert verdict.core and not verdict.why
    assert "transformers_version" in verdict.ignored and "hidden_size" not in verdict.ignored


@pytest.mark.parametrize("key", [
    "auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
    "_experts_implementation_internal", "custom_generate",
])  # fmt: skip
def test_keys_that_run_code_or_choose_kernels_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"model/config.json.*{key}"):
        check_config({**PLAIN, key: "evil/kernel"}, "model/config.json")
    with pytest.raises(UserError, match=key):
        check_config({**PLAIN, "text_config": {"layers": [{key: "evil/kernel"}]}})
    check_config({**PLAIN, key: None})  # a null says nothing


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "no multiple"),
    ({"head_dim": 7}, "size 7"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"model_type": None}, "model_type is missing"),
])  # fmt: skip
def test_sizes_and_types_are_checked(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_config({**PLAIN, **change})


@pytest.mark.parametrize("change, why", [
    ({"model_type": "qwen2"}, "model_type qwen2"),
    ({"qk_norm": True}, "field qk_norm"),
    ({"hidden_act": "gelu_new"}, "hidden_act gelu_new"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters of type 'longrope'"),
    ({"rope_scaling": {"type": "proportional"}}, "rope_scaling of type 'proportional'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "rope_parameters.mscale"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "rope_parameters.partial_rotary_factor"),
    ({"pretraining_tp": 2}, "pretraining_tp 2"),
    ({"quantization_config": {"bits": 4}}, "field quantization_config"),
])  # fmt: skip
def test_what_the_core_does_not_know_goes_to_transformers(change: dict, why: str) -> None:
    verdict = check_config({**PLAIN, **change})
    assert not verdict.core and verdict.why == (why,)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"type": "linear", "factor": 2},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": None},
])  # fmt: skip
def test_stretched_positions_are_for_the_core(rope: dict) -> None:
    assert check_config({**PLAIN, "rope_parameters": rope}).core


@pytest.mark.parametrize("rope, words", [
    ({"rope_type": "linear"}, "config.json: rope_parameters: rope_type linear needs factor"),
    ({"rope_type": "dynamic", "factor": 0.5}, "rope_parameters.factor.*greater than or equal to 1"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast 1 must be above beta_slow 2"),
    ({"rope_type": "default", "rope_theta": "x"}, "rope_parameters.rope_theta"),
    ({"rope_type": "default", "rope_theta": -1.0}, "rope_parameters.rope_theta"),
])  # fmt: skip
def test_rotary_values_that_mean_nothing_are_refused(rope: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_config({**PLAIN, "rope_parameters": rope})


def test_llama3_scaling_and_old_rope_fields_are_known() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    old = {k: v for k, v in PLAIN.items() if k != "rope_parameters"}
    assert check_config({**old, "rope_theta": 5e5, "rope_scaling": scaling}).core
    assert check_config({**PLAIN, "rope_parameters": {**scaling, "rope_theta": 5e5}}).core


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="missing"):
        read_json(path)
    for text, words in (("[1]", "object"), ("{", "not JSON"), ("[" * 100_000, "not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_json(path)
