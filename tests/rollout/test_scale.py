"""The scale of a reward model's scores."""

from __future__ import annotations

import statistics

import pytest
import torch

from pipeline.data.groups import comparison_groups
from pipeline.flow.errors import RowFailed
from pipeline.llama.make import score_layer
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward, raw_scores
from pipeline.rollout.scale import normalise
from pipeline.train.strategy import build as build_strategy
from tests.small import chat, comparison, forget_gradients, policy, prompts, scorer

SAMPLING = SamplingSettings(samples=1, max_new_tokens=6)
KEY = NoiseKey(0, "reward")
GROUPS = comparison_groups([comparison(f"q{i}", "good" * i, "bad") for i in range(9)], chat(), 99).groups


def run(made, *, asked: bool = True):
    """What the stage does after training."""
    return normalise(
        made,
        policy=forget_gradients(policy()) if asked else None,
        prompts=encode_prompts(prompts(*"abcdefghijklmnop"), chat(), 99, 6) if asked else None,
        sampling=SAMPLING,
        groups=GROUPS,
        key=KEY,
        token_budget=64,
        ranks=build_strategy(device="cpu"),
    )


def test_samples_of_the_policy_have_mean_0_and_variance_1_afterwards():
    """T25: the scale is in the head, the shift beside it."""
    made = scorer(1)
    before = score_layer(made.model).weight.detach().clone()
    scale = run(made)
    assert scale.on == "samples of the policy"
    assert scale.shift == pytest.approx(-scale.mean / scale.std)
    torch.testing.assert_close(score_layer(made.model).weight.detach() * scale.std, before)
    sampler = Sampler(policy().model, chat(), SAMPLING, KEY, reward=Reward(made.module, chat(), scale.shift))
    scores = [
        s.scores["proxy"] for s in sampler.sample(encode_prompts(prompts(*"abcdefghijklmnop"), chat(), 99, 6)).samples
    ]
    assert statistics.fmean(scores) == pytest.approx(0, abs=1e-5)
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-5)


def test_without_prompts_the_compared_answers_set_the_scale():
    made = scorer(1)
    scale = run(made, asked=False)
    scores = [x + scale.shift for x in raw_scores(made.module, GROUPS)]
    assert scale.on == "compared answers" and len(scores) == 18
    assert statistics.fmean(scores) == pytest.approx(0, abs=1e-5)
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-5)


def test_the_order_of_answers_stays():
    made = scorer(1)
    before = raw_scores(made.module, GROUPS)
    run(made)
    after = raw_scores(made.module, GROUPS)
    assert sorted(range(18), key=before.__getitem__) == sorted(range(18), key=after.__getitem__)


def test_a_model_that_tells_nothing_apart_is_refused():
    made = scorer(1)
    with torch.no_grad():
        score_layer(made.model).weight.zero_()
    with pytest.raises(RowFailed, match="the same score to all samples of the policy"):
        run(made)
