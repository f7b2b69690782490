"""Held-out comparisons scored by a reward model and, where there is one, by the judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.records import Comparison, Prompt, Sample
from pipeline.evaluate.judges import GoldJudge
from pipeline.evaluate.scorecard import ScoredPairs
from pipeline.flow.errors import UserError
from pipeline.rollout.reward import Reward, score_texts


def scored_pairs(
    comparisons: Sequence[Comparison], reward: Reward, judge: GoldJudge | None, token_budget: int
) -> ScoredPairs:
    """Every strictly ordered pair, chosen and rejected as labelled; lengths in characters.

    UserError where all completions tie.
    """
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for number, comparison in enumerate(comparisons):
        prompt = Prompt(str(number), comparison.prompt)
        for pair in comparison.pairs():
            for side, index in zip(sides, pair, strict=True):
                text = comparison.completions[index].text
                side.append(Sample(prompt, index, text, (), (), stopped=True))
    if not sides[0]:
        raise UserError(f"none of the {len(comparisons)} held-out comparisons orders its completions: all are ties")
    chosen, rejected = (np.array(score_texts(reward, side, token_budget)) for side in sides)
    lengths = [np.array([len(s.text) for s in side], dtype=np.float64) for side in sides]
    if judge is None:
        return ScoredPairs(chosen, rejected, lengths[0], lengths[1])
    gold = [[judge.score(s.prompt.messages, s.text, True) for s in side] for side in sides]
    totals = [np.array([g.total for g in side]) for side in gold]
    parts = [{p: np.array([float(g.parts[p]) for g in side]) for p in side[0].parts} for side in gold]
    return ScoredPairs(chosen, rejected, lengths[0], lengths[1], totals[0], totals[1], parts[0], parts[1])
