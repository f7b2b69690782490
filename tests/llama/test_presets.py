"""Published parameter counts."""

from __future__ import annotations

import pydantic
import pytest
from transformers import LlamaConfig

from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.presets import PRESETS, ModelSettings, parameter_count

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "stories-15m": 15_191_712,
    "stories-42m": 41_689_600,
    "stories-110m": 109_529_856,
    "stories-260k": 260_032,
}


def test_parameter_counts_are_those_published() -> None:
    assert {name: parameter_count(PRESETS[name]) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("settings", [
    {"preset": "test"},
    {"preset": "test", "tie_word_embeddings": True, "head_dim": 10},
    {"preset": "test", "attention_bias": True, "mlp_bias": True},
])  # fmt: skip
def test_the_formula_counts_a_real_model(settings: dict) -> None:
    shape = ModelSettings(**settings).llama(97)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


def test_every_preset_is_a_valid_config() -> None:
    for name in PRESETS:
        shape = ModelSettings.model_validate(name).llama(300)
        config = LlamaConfig(**shape)
        assert config.vocab_size == 300 and config.head_dim % 2 == 0
        assert config.rope_parameters["rope_theta"] == shape.get("rope_theta", config.rope_parameters["rope_theta"])


def test_fields_beside_a_preset_change_it() -> None:
    shape = ModelSettings(preset="llama-3.2-1b", num_hidden_layers=2, rope_theta=1e4).llama(50)
    assert shape["num_hidden_layers"] == 2 and shape["hidden_size"] == 2048
    assert shape["rope_parameters"]["rope_theta"] == 1e4 and shape["rope_parameters"]["rope_type"] == "llama3"
    assert ModelSettings(hidden_size=64, num_attention_heads=8).llama(50)["num_key_value_heads"] == 8


@pytest.mark.parametrize("wrong, words", [
    ("llama-3-9b", "did you mean"),
    ({"num_attention_heads": 3}, "hidden_size 128 is no multiple"),
    ({"num_attention_heads": 8, "num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "odd"),
    ({"hiden_size": 7}, "hidden_size"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(wrong, words: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=words):
        ModelSettings.model_validate(wrong)
