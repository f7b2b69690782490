"""What a plan may say about rotary positions, and what becomes of it."""

from __future__ import annotations

import pytest

from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.presets import ModelSettings
from pipeline.llama.rope_settings import NEEDED, OPTIONAL, RopeSettings, ntk_theta, rope_fields


@pytest.mark.parametrize("values, words", [
    ({"rope_type": "linear"}, "rope_type linear needs factor"),
    ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}, "llama3 needs high_freq_factor"),
    ({"factor": 2}, "factor does nothing under rope_type default: it takes ntk_factor"),
    ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "beta_fast does nothing under rope_type linear"),
    ({"rope_type": "linear", "factor": 0.5}, "rope.factor: .*greater than or equal to 1"),
    ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}, "must be above low_freq"),
    ({"rope_type": "yarn", "factor": 2, "beta_slow": 40}, "beta_fast 32 must be above beta_slow 40"),
    ({"rope_type": "yarnn", "factor": 2}, "rope.rope_type"),
    ({"rope_type": "yarn", "factr": 2}, "did you mean 'factor'"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_settings(RopeSettings, values, "rope")


def test_parameters_are_those_of_transformers() -> None:
    linear = RopeSettings(rope_type="linear", factor=2)
    assert linear.parameters(1e4, 64, 16) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    yarn = RopeSettings(rope_type="yarn", factor=4, rope_theta=500.0).parameters(1e4, 64, 16)
    assert yarn == {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert ntk_theta(1e4, 4, 16) == pytest.approx(1e4 * 4 ** (16 / 14))
    assert NEEDED.keys() == OPTIONAL.keys() == {*NEEDED} and rope_fields("longrope") is None
    assert rope_fields("dynamic") == {"rope_type", "type", "rope_theta", "factor"}


def test_a_model_is_given_them_by_name() -> None:
    shape = ModelSettings(preset="test", rope_parameters={"rope_type": "yarn", "factor": 2}).llama(97)
    assert shape["rope_parameters"]["original_max_position_embeddings"] == shape["max_position_embeddings"] == 2048
    other = ModelSettings(preset="test", rope_theta=500.0, rope_parameters={"rope_type": "linear", "factor": 2}).llama(
        97
    )
    assert other["rope_parameters"]["rope_theta"] == 500.0 and "rope_theta" not in other
    with pytest.raises(UserError, match="rope_theta is given twice"):
        parse_settings(ModelSettings, {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "model")
    assert "rope_parameters" not in ModelSettings(preset="test").identity()
