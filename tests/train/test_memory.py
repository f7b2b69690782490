"""The predicted peak, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from pipeline.train import memory
from pipeline.train.settings import TrainSettings


def test_the_parts_of_the_prediction():
    trained, frozen = nn.Linear(3, 2, bias=False), nn.Linear(5, 2, bias=False)  # 6 and 10 parameters
    shape = {"tokens": 7, "hidden": 3, "layers": 2, "intermediate": 4, "vocabulary": 11, "scored": 5}
    weights, states = 4 * 16, 12 * 6
    activations = 4 * 7 * 2 * (10 * 3 + 4 * 4)
    logits = 2 * 4 * 5 * 11
    assert memory.predict([trained], [frozen], **shape) == weights + states + activations + logits
    two = memory.predict([trained, frozen], [], **shape)  # each trunk keeps its own activations
    assert two == weights + 12 * 16 + 2 * activations + logits


def test_what_an_adapter_leaves_frozen_has_no_optimiser_state():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 1, bias=False))
    model[0].requires_grad_(False)
    assert (memory.parameters(model), memory.trainable(model)) == (110, 10)


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1500, "1.5 KB"), (2_340_000, "2.34 MB"), (8e9, "8 GB"), (3e12, "3 TB")]
)
def test_sizes_for_people(size: float, text: str):
    assert memory.human(size) == text


def test_the_statement_names_the_setting_that_decides():
    config = SimpleNamespace(hidden_size=3, num_hidden_layers=2, intermediate_size=4, vocab_size=11)
    model = SimpleNamespace(config=config)
    said = memory.statement(
        [nn.Linear(3, 2, bias=False)], [nn.Linear(5, 2, bias=False)], model, TrainSettings(token_budget=64)
    )
    assert said.startswith("trains 6 of 6 parameters, 10 frozen; predicted peak memory ")
    assert said.endswith("for 64 tokens a pass (train.token_budget)")
