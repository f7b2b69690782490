"""Operations against numbers worked out elsewhere and by hand."""

from __future__ import annotations

import pytest

from pipeline.estimate import operations
from pipeline.estimate.shape import Model, Shape
from pipeline.llama.adapters import LoraSettings
from pipeline.llama.presets import PRESETS

SEVEN = Shape.of(PRESETS["llama-2-7b"])
TINY = Shape.of(PRESETS["test"])


def test_six_and_eight_a_parameter_and_token():
    assert operations.training(SEVEN.parameters, 1e12) == pytest.approx(4.0430493696e22, rel=1e-12)
    assert operations.training(SEVEN.parameters, 1e12, recomputed=True) == pytest.approx(5.3907324928e22, rel=1e-12)


@pytest.mark.parametrize(
    ("lengths", "expected"), [([512, 1024, 2048], 149_226_491_215_872), ([4096] * 3, 536_372_695_793_664)]
)
def test_with_attention_as_verl_counts(lengths: list[int], expected: int):
    """verl counts both tables, and half of all pairs of tokens of a sequence."""
    products = operations.training(SEVEN.trunk + 2 * SEVEN.table, sum(lengths))
    assert products + 3 * operations.attention(SEVEN, sum(n * n / 2 for n in lengths)) == expected


def test_a_forward_pass_by_hand():
    layer = (
        2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    )  # of the shape "test": hidden 32, 4 heads of 8, 2 key heads, inner 48
    expected = 2 * (2 * layer * 10 + 97 * 32 * 3) + 4 * 2 * 32 * 55
    assert operations.forward(Model(TINY, "a"), 10, operations.pairs([10]), scored=3) == expected
    assert operations.forward(Model(TINY, "a", scalar=True), 10, 55) == 2 * 2 * layer * 10 + 4 * 2 * 32 * 55


def test_an_update_is_three_forward_passes_and_one_more_with_recomputation():
    model = Model(TINY, "a")
    once = operations.forward(model, 10, 55, 10)
    assert operations.update(model, 10, 55, 10) == 3 * once
    assert operations.update(model, 10, 55, 10, recomputed=True) == 3 * once + operations.forward(model, 10, 55)


def test_frozen_weights_under_an_adapter_cost_four_a_token():
    lora = LoraSettings(rank=2, targets="attention")
    model = Model(TINY, "a", lora)
    expected = 4 * TINY.trunk * 10 + 6 * model.own * 10 + 3 * operations.attention(TINY, 55)
    assert operations.update(model, 10, 55) == expected


def test_sampling_reads_a_prompt_once_for_its_answers():
    model = Model(TINY, "a")
    seen = operations.pairs([5]) + 4 * operations.pairs([3], before=5)
    assert operations.sampling(model, 1, 5, 4, 3) == operations.forward(model, 5 + 12, seen, scored=12)
