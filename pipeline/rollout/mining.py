"""What is made of scored samples: the answers worth learning, and pairs of a better and a worse one.

    choose(samples, "proxy", ChooseSettings()).records                       # conversations, the best of each prompt
    mine(samples, "proxy", PairSettings(by="adjacent", per_prompt=2), seed=0).records        # comparisons for DPO

Samples are grouped by their prompt's id, prompts in order of first appearance, so that shuffling prompts
shuffles what comes out and changes nothing else. Of equal scores the lowest index goes first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from pydantic import Field, model_validator

from pipeline.data.records import Comparison, Completion, Conversation, Message, Sample
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.rollout.noise import fold

R = TypeVar("R")

NUL = "\N{SYMBOL FOR NULL}"  # stands in a stored text for a NUL, which no reader of records accepts
REPEATS = 6  # one to four tokens, this many times in a row: degenerate


class ChooseSettings(Settings):
    """Which answers become conversations to train on."""

    by: Literal["best", "fraction", "threshold"] = Field(
        default="best",
        description="best: the highest score of each prompt (best of N; RAFT, Dong et al. 2023); fraction: the upper "
        "`fraction` of each prompt's answers; threshold: every answer that scores `threshold` or more.",
    )
    fraction: float = Field(
        default=0.25, gt=0, le=1, description="Share of each prompt's usable answers, rounded up, under `by: fraction`."
    )
    threshold: float | None = Field(
        default=None, description="Least score of a chosen answer, under any `by`; null takes any."
    )

    @model_validator(mode="after")
    def _complete(self) -> ChooseSettings:
        if self.by == "threshold" and self.threshold is None:
            raise ValueError("by: threshold chooses by a least score: give threshold a number")
        return self


class PairSettings(Settings):
    """Which two answers to a prompt become a comparison."""

    by: Literal["best_worst", "best_random", "adjacent", "all"] = Field(
        default="best_worst",
        description="best_worst: the highest against the lowest score; best_random: the highest against a random lower "
        "one; adjacent: each against the next lower score; all: every two of different score.",
    )
    margin: float = Field(
        default=0.0, ge=0, description="Least score difference of a pair; equal scores never make one."
    )
    per_prompt: int | None = Field(
        default=None, ge=1, description="Most pairs of a prompt, those with the largest difference first; null: all."
    )


@dataclass(frozen=True, slots=True)
class Pair:
    better: Sample
    worse: Sample
    margin: float  # difference of their scores, above 0


@dataclass(frozen=True, slots=True)
class Mined(Generic[R]):
    """Records made of samples, and how many samples or prompts were passed over as what."""

    records: list[R]
    skipped: Counter[str]

    @property
    def passed_over(self) -> str:
        """`skipped` in words: "unfinished: 2, prompts without: 1"."""
        return ", ".join(f"{what.replace('_', ' ')}: {count}" for what, count in self.skipped.items())


# --- samples by prompt --------------------------------------------------------------------------------------


def by_prompt(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each prompt id by iteration and index; where several stores have the same, as they come.

    UserError where one id stands for two prompts: their answers cannot be compared.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        group = groups.setdefault(sample.prompt.id, [])
        if group and group[0].prompt.messages != sample.prompt.messages:
            raise UserError(
                f"samples: prompt id {sample.prompt.id!r} stands for two different prompts, so their answers cannot be "
                "compared: read these stores in rows of their own, or give prompts ids that differ"
            )
        group.append(sample)
    return {prompt: sorted(group, key=_place) for prompt, group in groups.items()}


def _place(sample: Sample) -> tuple[int, int]:
    return (sample.origin.iteration if sample.origin else 0, sample.index)


def score_of(sample: Sample, source: str) -> float:
    """UserError where the sample has no score of that source, naming those it has."""
    if source not in sample.scores:
        known = ", ".join(sorted(sample.scores)) or "none"
        raise UserError(
            f"sample {sample.index} of prompt {sample.prompt.id}: no score {source!r} (it has: {known}); name one of "
            "those, or wire a reward model that gives it"
        )
    return sample.scores[source]


def ranked(group: Sequence[Sample], source: str) -> list[Sample]:
    """From the highest score down, of equal ones in the order given."""
    return sorted(group, key=lambda s: -score_of(s, source))


def drop_useless(samples: Iterable[Sample], *, unfinished: bool = False) -> tuple[list[Sample], Counter[str]]:
    """Samples worth keeping, and how many were dropped as what.

    empty        no text
    duplicate    the text of an earlier sample of the same prompt (the lowest index stays)
    unreadable   a NUL character, which no reader of records accepts, or the sign for it
    repetitive   one to four tokens over and over
    unfinished   cut off at the length limit; dropped only if asked for
    """
    kept: list[Sample] = []
    dropped: Counter[str] = Counter()
    for group in by_prompt(samples).values():
        seen: set[str] = set()
        for sample in group:
            why = _useless(sample, seen, unfinished)
            if why:
                dropped[why] += 1
            else:
                kept.append(sample)
                seen.add(sample.text)
    return kept, dropped


def _useless(sample: Sample, seen: set[str], unfinished: bool) -> str | None:
    if not sample.text.strip():
        return "empty"
    if sample.text in seen:
        return "duplicate"
    if NUL in sample.text or "\0" in sample.text:
        return "unreadable"
    if any(repeats(sample.ids, period) for period in range(1, 5)):
        return "repetitive"
    return "unfinished" if unfinished and not sample.stopped else None


def repeats(ids: Sequence[int], period: int, times: int = REPEATS) -> bool:
    """Whether some run of `period` ids stands `times` times in a row."""
    run = 0
    for i in range(period, len(ids)):
        run = run + 1 if ids[i] == ids[i - period] else 0
        if run >= period * (times - 1):
            return True
    return False


# --- choosing answers ---------------------------------------------------------------------------------------


def choose(samples: Sequence[Sample], source: str, settings: ChooseSettings) -> Mined[Conversation]:
    """The chosen finished samples as conversations, each prompt's from the best down.

    An unfinished one is not taken: rendered as a conversation it would get an end that it never had.
    `skipped` counts useless samples, those `below_threshold` that would have been taken, and `prompts_without` any.
    """
    kept, skipped = drop_useless(samples, unfinished=True)
    chosen: list[Sample] = []
    fruitful = 0
    for group in by_prompt(kept).values():
        wanted = _upper(ranked(group, source), settings)
        taken = [s for s in wanted if settings.threshold is None or score_of(s, source) >= settings.threshold]
        skipped["below_threshold"] += len(wanted) - len(taken)
        fruitful += bool(taken)
        chosen += taken
    skipped["prompts_without"] = len({s.prompt.id for s in samples}) - fruitful
    return Mined(list(conversations(chosen)), +skipped)


def _upper(group: list[Sample], settings: ChooseSettings) -> list[Sample]:
    if settings.by == "best":
        return group[:1]
    if settings.by == "fraction":
        return group[: math.ceil(settings.fraction * len(group) - 1e-9)]  # 0.28 * 25 is more than 7
    return group


def best_of(samples: Iterable[Sample], source: str) -> list[Sample]:
    """The sample of each prompt with the highest score; of equal ones that with the lowest index."""
    return [ranked(group, source)[0] for group in by_prompt(samples).values()]


def conversations(samples: Iterable[Sample]) -> Iterator[Conversation]:
    """Each prompt continued by its sample; under train_on: marked the sample alone weighs."""
    for sample in samples:
        history = [replace(m, weight=0.0) if m.role == "assistant" else m for m in sample.prompt.messages]
        yield Conversation((*history, Message("assistant", sample.text, weight=1.0)), source=sample.prompt.source)


# --- mining pairs -------------------------------------------------------------------------------------------


def mine(samples: Sequence[Sample], source: str, settings: PairSettings, *, seed: int) -> Mined[Comparison]:
    """Pairs of finished samples of a prompt as comparisons; `seed` draws the random ones, prompt by prompt.

    `skipped` counts useless samples and `prompts_without` a pair.
    """
    kept, skipped = drop_useless(samples, unfinished=True)
    pairs: list[Pair] = []
    fruitful = 0
    for prompt, group in by_prompt(kept).items():
        found = pairs_of(group, source, settings, draw=fold(seed, "pairs", prompt))
        fruitful += bool(found)
        pairs += found
    skipped["prompts_without"] = len({s.prompt.id for s in samples}) - fruitful
    return Mined(list(comparisons(pairs, source)), +skipped)


def pairs_of(group: Sequence[Sample], source: str, settings: PairSettings, *, draw: int = 0) -> list[Pair]:
    """The pairs of one prompt, those with the largest difference first. `draw` chooses a random partner."""
    order = ranked(group, source)
    worth = [score_of(s, source) for s in order]
    apart = lambda i, j: worth[i] - worth[j] >= settings.margin and worth[i] > worth[j]
    n = len(order)
    if settings.by == "all":
        found = [(i, j) for i in range(n) for j in range(i + 1, n)]
    elif settings.by == "adjacent":
        steps = [i for i in range(n) if i == 0 or worth[i] < worth[i - 1]]  # the first of each score
        found = list(zip(steps, steps[1:], strict=False))
    elif settings.by == "best_random":
        lower = [j for j in range(1, n) if apart(0, j)]
        found = [(0, lower[draw % len(lower)])] if lower else []
    else:
        found = [(0, worth.index(worth[-1]))] if n > 1 else []
    pairs = [Pair(order[i], order[j], worth[i] - worth[j]) for i, j in found if apart(i, j)]
    return sorted(pairs, key=lambda p: -p.margin)[: settings.per_prompt]


def comparisons(pairs: Iterable[Pair], source: str) -> Iterator[Comparison]:
    """The better one first, each with its score: their difference is the margin."""
    for pair in pairs:
        completions = tuple(Completion(s.text, score=score_of(s, source)) for s in (pair.better, pair.worse))
        prompt = pair.better.prompt
        yield Comparison(prompt.messages, completions, annotator=source, source=prompt.source)
