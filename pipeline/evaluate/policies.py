"""One policy on a set of prompts: its answers, what they score, how far it has moved, what it still knows.

Legend: P prompts, K samples of each; lists of samples are in prompt order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.data.forest import build, cut
from pipeline.data.groups import document_groups
from pipeline.data.records import Document, Prompt, Sample
from pipeline.evaluate.compare import Floats
from pipeline.evaluate.judges import GoldJudge
from pipeline.llama.open import Trainable
from pipeline.report.samples import Answer, Exhibit
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.portions import Portions
from pipeline.rollout.reward import Reward, score_texts
from pipeline.rollout.reward_settings import PROXY
from pipeline.rollout.rewards import Rewards
from pipeline.rollout.scoring import token_logprobs


@dataclass
class Answered:
    """A policy's samples and their scores, each [P, K]."""

    name: str
    samples: list[Sample]
    length: Floats
    stopped: Floats
    scores: dict[str, Floats] = field(default_factory=dict)  # proxy, heldout, gold
    parts: dict[str, Floats] = field(default_factory=dict)
    kl: float | None = None
    text_perplexity: float | None = None
    context: dict[str, Any] | None = None  # as `context.context_figures` has it

    def metrics(self) -> dict[str, Any]:
        """The figures of this policy alone, as an evaluation row records them."""

        def mean(name: str) -> float | None:
            return float(self.scores[name].mean()) if name in self.scores else None

        return {
            "proxy": mean("proxy"),
            "heldout": mean("heldout"),
            "gold": mean("gold"),
            "gold_parts": {k: float(v.mean()) for k, v in self.parts.items()} or None,
            "win_rate": None,
            "kl": self.kl,
            "length": float(self.length.mean()),
            "stop_rate": float(self.stopped.mean()),
            "text_perplexity": self.text_perplexity,
            **({"context": self.context} if self.context else {}),
        }


def answer(
    name: str, role: Trainable, prompts: Sequence[Prompt], sampling: SamplingSettings, max_tokens: int, key: NoiseKey,
    progress: Any = None, kept: Portions | None = None,
) -> Answered:  # fmt: skip
    """Sample every prompt. All policies of a row share the noise, so that they differ by their weights alone.

    With `kept` a row that was killed goes on with the answers that it had.
    """
    encoded = encode_prompts(prompts, role.chat, max_tokens, sampling.max_new_tokens)
    sampler = Sampler(role.model, role.chat, sampling, key)
    if kept is None:
        rollout = sampler.sample(encoded, progress=progress)
    else:
        rollout = kept.sample(f"{name} {sampling.samples}", sampler, encoded, progress=progress)
    table = (len(encoded), sampling.samples)
    return Answered(
        name,
        rollout.samples,
        np.array([len(s.ids) for s in rollout.samples], dtype=np.float64).reshape(table),
        np.array([s.stopped for s in rollout.samples], dtype=np.float64).reshape(table),
    )


def add_reward(answered: Answered, source: str, reward: Reward | Rewards, token_budget: int) -> None:
    """Scores by a reward model, on the text rendered in its own format, or by all that a policy is rewarded for."""
    if isinstance(reward, Rewards):
        scores = [found[PROXY] for found in reward.score(answered.samples, token_budget=token_budget)]
    else:
        scores = score_texts(reward, answered.samples, token_budget)
    answered.scores[source] = np.array(scores).reshape(answered.length.shape)


def add_gold(answered: Answered, judge: GoldJudge) -> None:
    """The judge's total and its parts."""
    found = [judge.score(s.prompt.messages, s.text, s.stopped) for s in answered.samples]
    answered.scores["gold"] = np.array([f.total for f in found]).reshape(answered.length.shape)
    for part in found[0].parts:
        values = np.array([float(f.parts[part]) for f in found])
        answered.parts[part] = values.reshape(answered.length.shape)


def kl_to(reference: Trainable, policy: Trainable, samples: Sequence[Sample], token_budget: int) -> float:
    """KL(policy || reference) in nats a response: mean of summed log ratios over samples drawn at temperature 1."""
    prompts = policy.chat.prompts_ids([s.prompt.messages for s in samples])
    groups = [(p, [s.ids]) for p, s in zip(prompts, samples, strict=True)]
    ours = token_logprobs(policy.module, groups, 1.0, token_budget)
    theirs = token_logprobs(reference.module, groups, 1.0, token_budget)
    ratios = [float((a.double() - b.double()).sum()) for (a,), (b,) in zip(ours, theirs, strict=True)]
    return math.fsum(ratios) / len(ratios)


@torch.no_grad()
def text_perplexity(role: Trainable, documents: Sequence[Document], max_tokens: int, token_budget: int) -> float:
    """exp of the mean negative log-prob of every predicted token of the documents: the alignment tax on plain text."""
    groups = document_groups(documents, role.chat, max_tokens).groups
    total, count = 0.0, 0.0
    for batch in cut(sorted(groups, key=lambda g: len(g[0].ids), reverse=True), token_budget):
        forest = build(batch).to(next(role.module.parameters()).device)
        total -= float((role.module(forest).logprobs_T.double() * forest.weights_T).sum())
        count += float(forest.weights_T.sum())
    return math.exp(total / count)


def exhibits(everyone: Sequence[Answered], shown: int) -> list[Exhibit]:
    """The first prompts with the first answer of every policy, for a person to read."""
    k = everyone[0].length.shape[1]
    out = []
    for p in range(min(shown, len(everyone[0].length))):
        answers = []
        for a in everyone:
            sample = a.samples[p * k]
            scores = {name: float(v[p, 0]) for name, v in a.scores.items()}
            parts = {name: float(v[p, 0]) for name, v in a.parts.items()}
            answers.append(Answer(a.name, sample.text, sample.stopped, len(sample.ids), scores, parts))
        prompt = everyone[0].samples[p * k].prompt
        out.append(Exhibit(prompt.id, prompt.messages, answers))
    return out
