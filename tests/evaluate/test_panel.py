"""Who scores answers, and who decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.data.records import Sample
from pipeline.evaluate.panel import Panel
from pipeline.evaluate.policies import Answered
from pipeline.rollout.reward import Reward, score_texts
from tests.small import chat, comparison, prompts, scorer

REWARD = Reward(scorer(1).module, chat(), 0.5)


class ByLength:
    """A judge: a tenth a character."""

    def score(self, prompt: Any, text: str, stopped: bool) -> Any:
        return SimpleNamespace(total=len(text) / 10, parts={"ended": stopped, "correct": True})


def answered(*lengths: int) -> Answered:
    """One prompt, answers of so many characters."""
    (prompt,) = prompts("q")
    made = [Sample(prompt, i, "a" * n, (9,) * n, (), True) for i, n in enumerate(lengths)]
    return Answered("sft", made, np.array([lengths], dtype=float), np.ones((1, len(lengths))))


@pytest.mark.parametrize(
    ("names", "judge", "decides"),
    [((), None, None), (("proxy",), None, "proxy"), (("proxy", "heldout"), None, "heldout"),
     (("proxy", "heldout"), ByLength(), "gold"), ((), ByLength(), "gold")],
)  # fmt: skip
def test_the_judge_decides_then_the_heldout_model_then_the_proxy(names: tuple[str, ...], judge: Any, decides: str):
    assert Panel(dict.fromkeys(names, REWARD), judge, 64).decisive == decides


def test_everyone_scores():
    found = answered(1, 4)
    Panel({"proxy": REWARD}, ByLength(), 64).score(found)
    assert found.scores["proxy"].tolist() == [score_texts(REWARD, found.samples, 64)]
    assert found.scores["gold"].tolist() == [[0.1, 0.4]]
    assert found.parts["ended"].tolist() == [[1.0, 1.0]]


def test_a_scorecard_needs_its_reward_model():
    pairs = [comparison("q", "long answer", "no"), comparison("r", "longer answer", "nope")]
    assert Panel({}, None, 64).scorecard("proxy", pairs) is None
    card = Panel({"proxy": REWARD}, None, 64).scorecard("proxy", pairs)
    assert card["labels"]["count"] == 2


def test_best_of_n_and_how_far_others_have_gone_towards_it():
    """Golds 0.1 and 0.5: the best of one is worth 0.3, the best of two 0.5; who scores 0.4 has gone half of the way."""
    other = answered(4)
    Panel({}, ByLength(), 64).score(other)
    table, closed = Panel({}, ByLength(), 64).best_of_n("sft", lambda: answered(1, 5), 2, [other], seed=0)
    assert table["policy"] == "sft"
    assert [row["by_gold"]["mean"] for row in table["rows"]] == pytest.approx([0.3, 0.5])
    assert closed["sft"]["mean"] == pytest.approx(0.5)
