"""Parameters and sizes: published ones, and those of models that are really made."""

from __future__ import annotations

import pytest

from pipeline.estimate.operations import forward
from pipeline.estimate.shape import Model, Shape, kv_bytes, lora_parameters
from pipeline.flow.errors import UserError
from pipeline.llama.adapters import LoraSettings
from pipeline.llama.presets import PRESETS
from tests import small
from tests.architectures import CASES

SEVEN, EIGHT = Shape.of(PRESETS["llama-7b"]), Shape.of(PRESETS["llama-3-8b"])


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400), ("stories-260k", 260_032),
    ],
)  # fmt: skip
def test_published_counts(preset: str, count: int):
    assert Shape.of(PRESETS[preset]).parameters == count


MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
}  # fmt: skip


def test_of_experts_all_are_held_and_two_compute():
    """Mixtral 8x7B: 46.7 billion parameters, of which 12.9 billion compute a token (Jiang et al. 2024, abstract)."""
    shape = Shape.of(MIXTRAL)
    assert shape.parameters == 46_702_792_704
    assert shape.computed == 32 * (41_943_040 + 2 * 176_160_768 + 8 * 4096)
    assert shape.computed + 2 * shape.table == 12_879_659_008
    assert forward(Model(shape, "a"), 10, 0) == 2 * 10 * shape.computed
    assert lora_parameters(shape, 8, "attention") == 32 * 8 * (2 * 8192 + 2 * 5120)
    with pytest.raises(UserError, match="set it to attention"):
        lora_parameters(shape, 8, "linear")


@pytest.mark.parametrize("case", CASES)
def test_models_with_options_have_as_many_parameters(case: str):
    made = small.policy(**CASES[case]).model
    shape = Shape.of(made.config.to_dict())
    assert shape.parameters == sum(p.numel() for p in made.parameters())
    held = sum(p.numel() for name, p in made.model.layers.named_parameters() if p.ndim > 1)
    assert shape.trunk == held


def test_what_lora_trains():
    assert lora_parameters(SEVEN, 8, "query_value") == 4_194_304
    assert lora_parameters(SEVEN, 16, "linear") == 39_976_960
    assert lora_parameters(EIGHT, 8, "query_value") == 3_407_872


@pytest.mark.parametrize(
    ("preset", "size"),
    [("llama-7b", 524_288), ("llama-13b", 819_200), ("llama-2-70b", 327_680), ("llama-3-8b", 131_072)],
)
def test_keys_and_values_of_a_token(preset: str, size: int):
    assert kv_bytes(Shape.of(PRESETS[preset])) == size


@pytest.mark.parametrize("tied", [False, True])
def test_models_that_are_made_have_as_many_parameters(tied: bool):
    made, scalar = small.policy(tie_word_embeddings=tied), small.scorer(tie_word_embeddings=tied)
    shape = Shape.of(made.model.config.to_dict())
    assert Model(shape, "a").parameters == sum(p.numel() for p in made.module.parameters())
    assert Model(shape, "a", scalar=True).parameters == sum(p.numel() for p in scalar.module.parameters())


@pytest.mark.parametrize("shape", [{}, {"feed_forward": "relu"}, {"num_local_experts": 4}], ids=str)
@pytest.mark.parametrize("scalar", [False, True])
def test_adapters_that_are_made_train_as_many(scalar: bool, shape: dict):
    from pipeline.llama.adapters import add_lora

    lora = LoraSettings(rank=3, targets="attention" if shape.get("num_local_experts") else "linear")
    made = (small.scorer if scalar else small.policy)(**shape)
    model = Model(Shape.of(made.model.config.to_dict()), "a", lora, scalar)
    adapted = add_lora(made.model, lora, seed=0)
    assert model.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert model.parameters == sum(p.numel() for p in adapted.parameters())
