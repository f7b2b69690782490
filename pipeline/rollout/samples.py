"""The store of samples: what was generated, with scores, so that nothing is generated twice.

One JSON object a line; `seed` and `tokens` say how it was drawn and what it cost (in tokens, never in
seconds):

    {"prompt": {"id": "p17", "messages": [{"role": "user", "content": "Hi"}]}, "index": 0, "text": "Hello.",
     "ids": [61, 12, 7], "logprobs": [-0.4, -0.1, -0.02], "stopped": true, "scores": {"proxy": 1.2},
     "seed": 0, "tokens": 3}

    best_conversations(samples, "proxy").records              # the best answer of each prompt, to train on
    best_worst_pairs(samples, "proxy", margin=0.5).records    # comparisons for DPO

Samples are grouped by their prompt's id, prompts in order of first appearance, so that shuffling prompts
shuffles what comes out and changes nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from pipeline.data import sources
from pipeline.data.records import Comparison, Completion, Conversation, Message, Sample
from pipeline.flow.errors import UserError

R = TypeVar("R")

REPEATS = 6  # one to four tokens, this many times in a row: degenerate


@dataclass(frozen=True, slots=True)
class Pair:
    best: Sample
    worst: Sample
    margin: float  # difference of their scores, above 0


@dataclass(frozen=True, slots=True)
class Mined(Generic[R]):
    """Records made of samples, and how many samples or prompts were passed over as what."""

    records: list[R]
    skipped: Counter[str]


# --- writing and reading ------------------------------------------------------------------------------------


def write_samples(path: Path, samples: Iterable[Sample], *, seed: int | None = None) -> int:
    """Write samples one a line; returns how many."""
    drawn = {} if seed is None else {"seed": seed}
    return sources.write_jsonl(path, ({**sources.to_json(s), **drawn, "tokens": len(s.ids)} for s in samples))


def read_samples(path: Path) -> list[Sample]:
    """All samples of a file. Raises UserError naming file and line where one is not as described above."""
    return list(sources.read_samples(path))


def with_scores(samples: Sequence[Sample], source: str, scores: Sequence[float]) -> list[Sample]:
    """The same samples with one more score each; a score of that source is replaced."""
    return [replace(s, scores={**s.scores, source: float(score)}) for s, score in zip(samples, scores, strict=True)]


# --- choosing -----------------------------------------------------------------------------------------------


def by_prompt(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of each prompt id, by index."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    return {prompt: sorted(group, key=lambda s: s.index) for prompt, group in groups.items()}


def best_of(samples: Iterable[Sample], source: str) -> list[Sample]:
    """The sample of each prompt with the highest score; of equal ones that with the lowest index."""
    return [max(group, key=lambda s: _score(s, source)) for group in by_prompt(samples).values()]


def mine_pairs(samples: Iterable[Sample], source: str, margin: float = 0.0) -> list[Pair]:
    """Best against worst of each prompt where they differ by more than `margin`; ties by lowest index."""
    pairs = []
    for group in by_prompt(samples).values():
        best = max(group, key=lambda s: _score(s, source))
        worst = min(group, key=lambda s: _score(s, source))
        apart = _score(best, source) - _score(worst, source)
        if apart > max(margin, 0.0) and best.text != worst.text:
            pairs.append(Pair(best, worst, apart))
    return pairs


def _score(sample: Sample, source: str) -> float:
    if source not in sample.scores:
        known = ", ".join(sorted(sample.scores)) or "none"
        raise UserError(f"sample {sample.index} of prompt {sample.prompt.id}: no score {source!r} (it has: {known})")
    return sample.scores[source]


def drop_useless(samples: Iterable[Sample], *, unfinished: bool = False) -> tuple[list[Sample], Counter[str]]:
    """Samples worth keeping, and how many were dropped as what.

    empty        no text
    duplicate    the text of an earlier sample of the same prompt (the lowest index stays)
    unreadable   a NUL character, which no reader of records accepts
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
    if "\0" in sample.text:
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


# --- turning into records -----------------------------------------------------------------------------------


def conversations(samples: Iterable[Sample]) -> Iterator[Conversation]:
    """Each prompt continued by its sample; under train_on: marked the sample alone weighs."""
    for sample in samples:
        history = [replace(m, weight=0.0) if m.role == "assistant" else m for m in sample.prompt.messages]
        yield Conversation((*history, Message("assistant", sample.text, weight=1.0)), source=sample.prompt.source)


def comparisons(pairs: Iterable[Pair], source: str) -> Iterator[Comparison]:
    """The better one first, each with its score: their difference is the margin."""
    for pair in pairs:
        completions = tuple(Completion(s.text, score=_score(s, source)) for s in (pair.best, pair.worst))
        prompt = pair.best.prompt
        yield Comparison(prompt.messages, completions, annotator=source, source=prompt.source)


def best_conversations(samples: Sequence[Sample], source: str) -> Mined[Conversation]:
    """The best finished sample of each prompt as a conversation.

    An unfinished one is not taken: rendered as a conversation it would get an end that it never had.
    """
    kept, skipped = drop_useless(samples, unfinished=True)
    best = best_of(kept, source)
    skipped["prompts_without"] = len(by_prompt(samples)) - len(best)
    return Mined(list(conversations(best)), +skipped)


def best_worst_pairs(samples: Sequence[Sample], source: str, margin: float = 0.0) -> Mined[Comparison]:
    """Best against worst finished sample of each prompt where their scores differ by more than `margin`."""
    kept, skipped = drop_useless(samples, unfinished=True)
    pairs = mine_pairs(kept, source, margin)
    skipped["prompts_without"] = len(by_prompt(samples)) - len(pairs)
    return Mined(list(comparisons(pairs, source)), +skipped)
