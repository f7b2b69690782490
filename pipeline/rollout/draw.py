"""Drawing many answers to each prompt, at one temperature or at each rung of a ladder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.chat import ChatFormat
from pipeline.data.records import Origin, Sample
from pipeline.rollout.collect import EncodedPrompts, Sampler
from pipeline.rollout.engine import EngineSettings, Progress, SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.portions import Portions
from pipeline.rollout.samples import recorded


def draw(
    model: Any,
    chat: ChatFormat,
    prompts: EncodedPrompts,
    sampling: SamplingSettings,
    origin: Origin,
    *,
    temperatures: Sequence[float] = (),
    ranks: Any = None,
    progress: Progress | None = None,
    engine: EngineSettings | None = None,
    kept: Portions | None = None,
) -> list[Sample]:
    """`sampling.samples` answers to each prompt, or as many at each of `temperatures`, not scored yet.

    In prompt order; a prompt's samples are numbered from rung to rung. Noise is keyed by the origin's seed, row and
    iteration, and on a ladder by the rung's own temperature: rungs draw from different noise, and what one draws
    does not depend on which others there are. With `kept` a row that was killed draws on where it stopped.
    """
    rungs: list[list[Sample]] = []
    for rung, temperature in enumerate(temperatures or [sampling.temperature]):
        settings = sampling.model_copy(update={"temperature": temperature})
        row = f"{origin.row} at {temperature!r}" if temperatures else str(origin.row)
        sampler = Sampler(model, chat, settings, NoiseKey(origin.seed or 0, row), engine=engine)
        if kept is None:
            rollout = sampler.sample(prompts, iteration=origin.iteration, ranks=ranks, progress=progress)
        else:
            rollout = kept.sample(f"rung{rung}", sampler, prompts, iteration=origin.iteration, progress=progress)
        own = replace(origin, temperature=temperature)
        rungs.append(recorded(rollout.samples, rollout.prompt_ids, own, first=rung * settings.samples))
    k = sampling.samples
    return [sample for p in range(len(prompts)) for rung in rungs for sample in rung[p * k : (p + 1) * k]]
