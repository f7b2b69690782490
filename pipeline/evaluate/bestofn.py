"""The best-of-n curve of a set of samples: what choosing by their scores gives, and what it costs in KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.records import Sample
from pipeline.evaluate.judges import GoldJudge
from pipeline.evaluate.scorecard import best_of_n
from pipeline.rollout.mining import by_prompt, score_of


def curve(samples: Sequence[Sample], source: str, judge: GoldJudge | None, *, seed: int) -> list[dict[str, Any]]:
    """Rows of `scorecard.best_of_n` for all samples as drawn (unfinished ones too), chosen by the score `source`.

    With a judge also in gold, which is recorded here and nowhere else. The bound on KL is given where all samples are
    draws of one policy at one temperature.
    """
    groups = list(by_prompt(samples).values())
    scores = [[score_of(s, source) for s in group] for group in groups]
    gold = None
    if judge:
        gold = [[judge.score(s.prompt.messages, s.text, s.stopped).total for s in group] for group in groups]
    return best_of_n(scores, gold, seed=seed, one_sampler=_one_sampler(samples))


def _one_sampler(samples: Sequence[Sample]) -> bool:
    drawn = {(s.origin.policy, s.origin.iteration, s.origin.temperature) if s.origin else None for s in samples}
    return len(drawn) == 1 and None not in drawn and all(s.origin and s.origin.temperature != 0.0 for s in samples)
