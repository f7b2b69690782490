"""The scale of a reward model's scores: mean 0 and variance 1 over answers that mean something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from pipeline.data.forest import Group, cut
from pipeline.flow.errors import RowFailed
from pipeline.llama.heads import ScalarModel
from pipeline.llama.make import fold_scale
from pipeline.llama.open import Trainable
from pipeline.rollout.collect import EncodedPrompts, Sampler
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward, raw_scores


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of raw scores, over whose answers, and the shift that is left after folding."""

    mean: float
    std: float
    on: str
    shift: float


def normalise(
    scorer: Trainable,
    *,
    policy: Trainable | None,
    prompts: EncodedPrompts | None,
    sampling: SamplingSettings,
    groups: Sequence[Group],
    key: NoiseKey,
    token_budget: int,
    ranks: Any,
) -> Scale:
    """Scores to mean 0 and variance 1 on the policy's own samples, or on the compared answers without prompts.

    The scale goes into the head's weight; the shift is returned (lm-human-preferences normalises before and after).
    """
    model = cast(ScalarModel, scorer.module)
    if policy is not None and prompts is not None:
        raw = Reward(model, scorer.chat, 0.0)
        sampler = Sampler(policy.model, policy.chat, sampling, key, reward=raw, token_budget=token_budget)
        rollout = sampler.sample(prompts, ranks=ranks)
        scores, on = [s.scores["proxy"] for s in rollout.samples], "samples of the policy"
    else:
        scores = [x for batch in cut(groups, token_budget) for x in raw_scores(model, batch)]
        on = "compared answers"
    values = torch.tensor(scores, dtype=torch.float64)
    mean, std = float(values.mean()), float(values.std(correction=0))
    if not std > 1e-6:
        raise RowFailed(f"the reward model gives the same score to all {on}: it has learned nothing to scale")
    return Scale(mean, std, on, fold_scale(scorer.model, mean, std))
