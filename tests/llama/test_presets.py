"""Published parameter counts, and what a token takes in the cache."""

from __future__ import annotations

import pydantic
import pytest
import torch
from transformers import LlamaConfig

from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.presets import PRESETS, ModelSettings, cached_numbers, parameter_count

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "stories-15m": 15_191_712,
    "stories-42m": 41_689_600,
    "stories-110m": 109_529_856,
    "stories-260k": 260_032,
}


TINY = {"test", "million"}
# multiple_of, ffn_dim_multiplier of Meta's params.json: the feed-forward's width follows from them.
WIDTHS = {
    "llama-7b": (256, 1), "llama-13b": (256, 1), "llama-33b": (256, 1), "llama-65b": (256, 1),
    "llama-2-70b": (4096, 1.3), "llama-3-8b": (1024, 1.3), "llama-3-70b": (4096, 1.3), "llama-3.1-405b": (4096, 1.2),
    "llama-3.2-1b": (256, 1.5), "llama-3.2-3b": (256, 1.0),
}  # fmt: skip


def test_parameter_counts_are_those_published() -> None:
    assert PRESETS.keys() - TINY == PUBLISHED.keys()
    assert {name: parameter_count(PRESETS[name]) for name in PUBLISHED} == PUBLISHED


def test_a_model_of_every_published_shape_has_that_many_parameters() -> None:
    """One layer of each; the others are its copies."""
    for name, published in PUBLISHED.items():
        shape = PRESETS[name]
        with torch.device("meta"):
            one = LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 1}))
        layer = sum(p.numel() for p in one.model.layers[0].parameters())
        rest = sum(p.numel() for p in one.parameters()) - layer
        assert rest + shape["num_hidden_layers"] * layer == published, name


def test_widths_follow_from_metas_formula() -> None:
    for name, (multiple, factor) in WIDTHS.items():
        width = int(factor * int(8 * PRESETS[name]["hidden_size"] / 3))
        assert PRESETS[name]["intermediate_size"] == multiple * -(-width // multiple), name


def test_the_later_ones_promise_128k_by_scaled_positions() -> None:
    for name, factor in {"llama-3.1-8b": 8, "llama-3.1-70b": 8, "llama-3.1-405b": 8, "llama-3.2-1b": 32}.items():
        scaling = {**PRESETS[name]["rope_parameters"]}
        assert PRESETS[name]["max_position_embeddings"] == 131_072 == 16 * scaling["original_max_position_embeddings"]
        assert (scaling["rope_type"], scaling["factor"], scaling["rope_theta"]) == ("llama3", factor, 500_000)
        assert (scaling["low_freq_factor"], scaling["high_freq_factor"]) == (1, 4)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_plan_names_a_preset(name: str) -> None:
    from stages.pretrain import Pretrain

    config = Pretrain.Config(model=name)
    assert config.model.llama(PRESETS[name]["vocab_size"]).items() >= PRESETS[name].items()


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


def test_latent_attention_caches_what_deepseek_v2_does() -> None:
    """Its table 1: (d_c + d_r) l numbers a token, which is 4.5 d_h l at d_c = 4 d_h and d_r = d_h / 2; 60 layers."""
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    shape = {"attention": "latent", "num_hidden_layers": 60, "num_attention_heads": 128, "hidden_size": 5120, **sizes}
    assert cached_numbers(shape) == 60 * 576 == 4.5 * 128 * 60
    assert cached_numbers(PRESETS["llama-7b"]) == 32 * 2 * 4096  # 524,288 bytes in 16 bits
