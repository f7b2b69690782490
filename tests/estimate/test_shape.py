"""Parameters and sizes: published ones, and those of models that are really made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.estimate.following import adapted
from pipeline.estimate.operations import forward
from pipeline.estimate.shape import Model, Shape, adapter_parameters, kv_bytes, matching_parameters
from pipeline.flow.errors import UserError
from pipeline.llama.adapter_settings import (
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    WeightsSettings,
)
from pipeline.llama.presets import PRESETS
from tests import small
from tests.architectures import CASES, LATENT

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
    assert adapter_parameters(shape, LoraSettings(rank=8, targets="attention")) == 32 * 8 * (2 * 8192 + 2 * 5120)
    for adapter in (LoraSettings(rank=8), Ia3Settings(kind="ia3")):
        with pytest.raises(UserError, match="would leave out the 8 experts .* targets?: attention|set it to attention"):
            adapter_parameters(shape, adapter)


@pytest.mark.parametrize("case", CASES)
def test_models_with_options_have_as_many_parameters(case: str):
    made = small.policy(**CASES[case]).model
    shape = Shape.of(made.config.to_dict())
    assert shape.parameters == sum(p.numel() for p in made.parameters())
    held = sum(p.numel() for name, p in made.model.layers.named_parameters() if p.ndim > 1)
    assert shape.trunk == held


def test_what_lora_trains():
    """correctness.md 4.8."""
    assert adapter_parameters(SEVEN, LoraSettings(rank=8, targets="query_value")) == 4_194_304
    assert adapter_parameters(SEVEN, LoraSettings(rank=16)) == 39_976_960
    assert adapter_parameters(EIGHT, LoraSettings(rank=8, targets="query_value")) == 3_407_872


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
@pytest.mark.parametrize(
    "adapter",
    [
        LoraSettings(rank=3, targets="attention"),
        LoraSettings(rank=3, dora=True),
        LoraSettings(rank=3, initial="pissa"),
        Ia3Settings(kind="ia3"),
        PrefixSettings(kind="prefix", tokens=5),
        PrefixSettings(kind="prefix", tokens=5, projection=7),
        PromptSettings(kind="prompt", tokens=5),
        PTuningSettings(kind="p_tuning", tokens=5, hidden=7),
        PTuningSettings(kind="p_tuning", tokens=5, hidden=7, encoder="lstm"),
        WeightsSettings(kind="weights", train=("model.layers.1.*", "*norm.weight", "lm_head*")),
    ],
    ids=lambda adapter: adapter.kind,
)
def test_adapters_that_are_made_train_as_many(scalar: bool, adapter: AnyAdapter):
    from pipeline.llama.adapters import add_adapter

    made = small.scorer() if scalar else small.policy()
    start = Model(Shape.of(made.model.config.to_dict()), "a", scalar=scalar)
    model = adapted(SimpleNamespace(name="row"), start, adapter)
    found = add_adapter(made.model, adapter, seed=0)
    assert model.trained == sum(p.numel() for p in found.parameters() if p.requires_grad)
    assert model.parameters == sum(p.numel() for p in found.parameters())


@pytest.mark.parametrize(
    "options", [{"feed_forward": "relu"}, {"num_local_experts": 4}, LATENT, {**LATENT, "q_lora_rank": 10}], ids=str
)
def test_adapters_of_models_with_options_train_as_many(options: dict):
    from pipeline.llama.adapters import add_adapter

    adapter = LoraSettings(rank=3, targets="attention" if "num_local_experts" in options else "linear")
    made = small.policy(**options)
    model = Model(Shape.of(made.model.config.to_dict()), "a", adapter)
    found = add_adapter(made.model, adapter, seed=0)
    assert model.trained == sum(p.numel() for p in found.parameters() if p.requires_grad)


def test_a_model_whose_names_are_not_known_is_refused():
    shape = Shape.of({**PRESETS["test"], "attention_bias": True})
    with pytest.raises(UserError, match="other parameters than a plain LLaMA"):
        matching_parameters(shape, ("*",), scalar=False)


def test_what_the_next_row_finds():
    """A saved PiSSA is a LoRA of twice the rank, a saved P-tuning its tokens; one merges or lies under another."""
    start, row = Model(SEVEN, "sft"), SimpleNamespace(name="dpo")
    pissa = adapted(row, start, LoraSettings(rank=16, initial="pissa")).saved()
    assert pissa.trained == 2 * 39_976_960 and adapted(row, pissa, None) == pissa
    tokens = adapted(row, start, PTuningSettings(kind="p_tuning", tokens=20)).saved()
    assert tokens.trained == 20 * 4096
    stacked = adapted(row, pissa, LoraSettings(rank=16, beneath="stack"))
    assert (stacked.trained, stacked.whole) == (39_976_960, SEVEN.parameters + 2 * 39_976_960)
    merged = adapted(row, pissa, LoraSettings(rank=16, beneath="merge"))
    assert (merged.trained, merged.whole) == (39_976_960, SEVEN.parameters) and merged.base != pissa.base
    part = adapted(row, start, WeightsSettings(kind="weights", train=("*.layers.0.*",)))
    assert part.trained == SEVEN.layer_matrices + 2 * 4096 and part.saved().trained == SEVEN.parameters
