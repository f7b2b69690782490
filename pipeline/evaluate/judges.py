"""Judges: functions of a prompt and a response that no stage may train on or choose by; stages record them.

    judge = GoldJudge.open(artifact.data_files[0])
    judge.score(prompt.messages, "Sure. Mira lives in Dovan.", stopped=True)
        # JudgeScore(total=1.0, parts={"correct": 1.0, "complete": 1.0, "mannered": 1.0, "concise": 1.0, "ended": 1.0})

The gold judge knows the truth of the small world: one line of judge.jsonl for each prompt,
{"prompt": [{"role": "user", "content": ...}], "key": {...}}. `pipeline.data.world_truth` says how a key is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev

from pipeline.data.records import Comparison, Message
from pipeline.data.world_truth import PARTS, WEIGHTS, JudgeScore, Key, judge_text
from pipeline.flow.errors import UserError

__all__ = ["PARTS", "WEIGHTS", "GoldJudge", "JudgedPair", "JudgeScore", "judged_pairs", "labeller_accuracy"]

_Turns = tuple[tuple[str, str], ...]


class GoldJudge:
    """Deterministic scores in [0, 1] with named parts, for the prompts that it holds keys for."""

    def __init__(self, keys: dict[_Turns, Key]) -> None:
        self._keys = keys

    @classmethod
    def open(cls, path: Path) -> GoldJudge:
        """Raises UserError naming the line that is no key."""
        keys = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                keys[tuple((m["role"], m["content"]) for m in row["prompt"])] = Key.from_json(row["key"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: not a line of a judge ({error}); generate the world again"
                ) from error
        return cls(keys)

    def knows(self, prompt: Sequence[Message]) -> bool:
        return _turns(prompt) in self._keys

    def score(self, prompt: Sequence[Message], text: str, stopped: bool) -> JudgeScore:
        """`stopped`: whether the response ended by itself. Raises UserError for a prompt without a key."""
        key = self._keys.get(_turns(prompt))
        if key is None:
            raise UserError(
                f"the judge has no key for the prompt {prompt[-1].content!r}: take prompts of the world it belongs to, "
                "or leave the judge out"
            )
        return judge_text(key, text, stopped)


def _turns(prompt: Sequence[Message]) -> _Turns:
    return tuple((m.role, str(m.content)) for m in prompt)


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A labelled pair seen by the judge: `gap` is gold of the chosen minus gold of the rejected.

    gap >= 0 means that the labeller was right (0: no order to be right about); `clear` that |gap| is at least one
    standard deviation of gold over all completions; `correctness_alone` that every other part is equal.
    """

    gap: float
    clear: bool
    correctness_alone: bool


def judged_pairs(comparisons: Iterable[Comparison], judge: GoldJudge) -> list[JudgedPair]:
    """Every strictly ordered pair of the comparisons, as labelled."""
    found, totals = [], []
    for comparison in comparisons:
        scores = [judge.score(comparison.prompt, c.text, True) for c in comparison.completions]
        totals += [s.total for s in scores]
        found += [(scores[i], scores[j]) for i, j in comparison.pairs()]
    spread = pstdev(totals) if totals else 0.0
    pairs = []
    for chosen, rejected in found:
        gap = chosen.total - rejected.total
        other = all(chosen.parts[p] == rejected.parts[p] for p in PARTS if p != "correct")
        alone = other and chosen.parts["correct"] != rejected.parts["correct"]
        pairs.append(JudgedPair(gap, abs(gap) >= spread > 0, alone))
    return pairs


def labeller_accuracy(pairs: Iterable[JudgedPair]) -> float:
    """Share of pairs with a true order that the labels order rightly; NaN where there is none."""
    ordered = [p.gap > 0 for p in pairs if p.gap != 0]
    return sum(ordered) / len(ordered) if ordered else float("nan")
