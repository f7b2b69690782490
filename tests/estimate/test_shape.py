"""Parameters and sizes: published ones, and those of models that are really made."""

from __future__ import annotations

import pytest

from pipeline.estimate.shape import Model, Shape, kv_bytes, lora_parameters
from pipeline.llama.adapters import LoraSettings
from pipeline.llama.presets import PRESETS
from tests import small

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


@pytest.mark.parametrize("scalar", [False, True])
def test_adapters_that_are_made_train_as_many(scalar: bool):
    from pipeline.llama.adapters import add_adapter

    lora = LoraSettings(rank=3, targets="attention")
    made = small.scorer() if scalar else small.policy()
    model = Model(Shape.of(made.model.config.to_dict()), "a", lora, scalar)
    adapted = add_adapter(made.model, lora, seed=0)
    assert model.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert model.parameters == sum(p.numel() for p in adapted.parameters())
