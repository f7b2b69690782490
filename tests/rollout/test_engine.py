from __future__ import annotations

import pydantic
import pytest

from pipeline.rollout.engine import SamplingSettings


def test_settings_agree_with_each_other():
    with pytest.raises(pydantic.ValidationError, match="lower min_new_tokens"):
        SamplingSettings(max_new_tokens=4, min_new_tokens=4)
    for wrong in ({"temperature": -1}, {"top_p": 0.0}, {"samples": 0}, {"max_new_tokens": 0}):
        with pytest.raises(pydantic.ValidationError):
            SamplingSettings(**wrong)


@pytest.mark.parametrize("change", [{"top_k": 5}, {"top_p": 0.9}, {"min_new_tokens": 1}, {"temperature": 0.0}])
def test_whether_logprobs_are_those_of_the_policy(change):
    assert not SamplingSettings(temperature=0.7).truncated
    assert SamplingSettings(**change).truncated
