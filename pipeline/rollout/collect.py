"""Prompts in, scored samples out: what PPO and rejection sampling do before they learn anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.chat import ChatFormat
from pipeline.data.forest import Group
from pipeline.data.groups import continuations
from pipeline.data.records import Prompt, Sample
from pipeline.flow.errors import UserError
from pipeline.rollout.engine import EngineSettings, Progress, SamplingSettings, new_engine
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Scorer


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts with their ids; those that leave no room for an answer are dropped and counted."""

    prompts: list[Prompt]
    ids: list[list[int]]
    dropped: int

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, numbers: Sequence[int]) -> EncodedPrompts:
        return EncodedPrompts([self.prompts[i] for i in numbers], [self.ids[i] for i in numbers], self.dropped)


def encode_prompts(prompts: Sequence[Prompt], chat: ChatFormat, max_tokens: int, max_new_tokens: int) -> EncodedPrompts:
    """UserError where not one prompt of `max_tokens - max_new_tokens` tokens or less is left."""
    everything = chat.prompts_ids([p.messages for p in prompts])
    room = max_tokens - max_new_tokens
    kept = [i for i, ids in enumerate(everything) if len(ids) <= room]
    _require_some(kept, max_tokens, max_new_tokens)
    return EncodedPrompts([prompts[i] for i in kept], [everything[i] for i in kept], len(prompts) - len(kept))


def fitting(
    prompts: Sequence[Prompt], chats: Sequence[ChatFormat], max_tokens: int, max_new_tokens: int
) -> list[Prompt]:
    """The prompts that `encode_prompts` keeps under every one of these formats, so that all policies answer the same.

    UserError where there is none.
    """
    left = list(prompts)
    for chat in chats:
        sizes = map(len, chat.prompts_ids([p.messages for p in left]))
        left = [p for p, n in zip(left, sizes, strict=True) if n <= max_tokens - max_new_tokens]
        _require_some(left, max_tokens, max_new_tokens)
    return left


def _require_some(kept: Sequence[object], max_tokens: int, max_new_tokens: int) -> None:
    if not kept:
        raise UserError(
            f"no prompt has at most {max_tokens - max_new_tokens} tokens (max_tokens {max_tokens} less "
            f"sampling.max_new_tokens {max_new_tokens}): raise max_tokens"
        )


@dataclass(frozen=True)
class Rollout:
    """Samples in prompt order, K of each, with their prompts' ids. Score sources are named in `Sample.scores`."""

    samples: list[Sample]
    prompt_ids: list[list[int]]
    figures: dict[str, float]

    def groups(self, scores: Sequence[float]) -> list[Group]:
        """[prompt] <- [s1] ... [sK] with the fact `score` on every sample and `sampler_logprobs` on its tokens."""
        k = len(self.samples) // len(self.prompt_ids)
        out = []
        for p, ids in enumerate(self.prompt_ids):
            chosen = range(p * k, (p + 1) * k)
            facts = [{"answer": 1.0, "score": scores[i]} for i in chosen]
            tokens = [{"sampler_logprobs": self.samples[i].logprobs} for i in chosen]
            out.append(continuations(ids, [self.samples[i].ids for i in chosen], facts, tokens))
        return out


class Sampler:
    """A policy's answers with their scores; the noise is keyed by seed, row, iteration, prompt and sample.

    `reward` scores them: `pipeline.rollout.rewards.Rewards`, or one reward model of the policy's own tokenizer.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        settings: SamplingSettings,
        key: NoiseKey,
        *,
        reward: Scorer | None = None,
        token_budget: int | None = None,
        engine: EngineSettings | None = None,
    ) -> None:
        self.chat, self.settings, self.key = chat, settings, key
        self.reward, self.token_budget = reward, token_budget
        self.engine = new_engine(
            engine or EngineSettings(),
            model,
            chat.stop_ids,
            chat.tokenizer.pad_token_id,
            to_text=chat.decode_all,
            tokenizer=chat.tokenizer,
        )

    def sample(
        self,
        encoded: EncodedPrompts,
        *,
        iteration: int = 0,
        ranks: Any = None,
        progress: Progress | None = None,
    ) -> Rollout:
        """Every rank samples its share of the prompts and gets the samples of all."""
        prompts, ids = encoded.prompts, encoded.ids
        mine = ranks.share([len(i) for i in ids]) if ranks is not None else list(range(len(ids)))
        key = NoiseKey(self.key.seed, self.key.row, iteration)
        my_ids = [ids[i] for i in mine]
        generated = self.engine.generate(my_ids, self.settings, key, progress, names=[prompts[i].id for i in mine])
        texts = iter(self.chat.answers([g.ids for group in generated for g in group]))
        own = [
            Sample(prompts[i], k, next(texts), g.ids, g.logprobs, g.stopped, {}, g.raw_logprobs)
            for i, group in zip(mine, generated, strict=True)
            for k, g in enumerate(group)
        ]
        scores = self.reward.score(own, my_ids, self.token_budget) if self.reward else [{} for _ in own]
        rows = [
            [s.text, s.ids, s.logprobs, s.raw_logprobs, s.stopped, found] for s, found in zip(own, scores, strict=True)
        ]
        each = self.settings.samples
        part = [[i, rows[n * each : (n + 1) * each]] for n, i in enumerate(mine)]
        everyone = {int(i): rows for p in (ranks.gather(part) if ranks is not None else [part]) for i, rows in p}
        samples = [
            Sample(prompt, k, text, tuple(answer), tuple(logprobs), stopped, found, tuple(raw))
            for i, prompt in enumerate(prompts)
            for k, (text, answer, logprobs, raw, stopped, found) in enumerate(everyone[i])
        ]
        return Rollout(samples, ids, figures(samples))


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """What a rollout looks like, with length in tokens and the share of answers that stopped by themselves."""
    lengths = np.array([len(s.ids) for s in samples], dtype=np.float64)
    out = {
        "length": float(lengths.mean()),
        "stop_rate": float(np.mean([s.stopped for s in samples])),
        "sampled_tokens": int(lengths.sum()),
        "samples": len(samples),
    }
    if samples and "proxy" in samples[0].scores:
        scores = np.array([s.scores["proxy"] for s in samples])
        out |= {"score": float(scores.mean()), "score_std": float(scores.std())}
        sources = [name for name in samples[0].scores if name != "proxy"]
        if len(sources) > 1:
            out |= {f"score/{name}": float(np.mean([s.scores[name] for s in samples])) for name in sources}
    return out
