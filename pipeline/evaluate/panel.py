"""Whoever scores answers in a row: reward models by name, and the judge.

panel = Panel.open(proxy=artifact, heldout=None, judge=judge_artifact, token_budget=16384)
panel.score(answered)        # answered.scores["proxy"], answered.scores["gold"], answered.parts
panel.decisive               # "gold": the judge decides wins where there is one, then held-out, then proxy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.data.records import Comparison
from pipeline.evaluate.compare import share_of_gap
from pipeline.evaluate.judges import GoldJudge
from pipeline.evaluate.pairs import scored_pairs
from pipeline.evaluate.policies import Answered, add_gold, add_reward
from pipeline.evaluate.scorecard import best_of_n, best_of_n_means, scorecard
from pipeline.flow.artifacts import Judge, RewardModel
from pipeline.rollout.reward import Reward, open_reward
from pipeline.rollout.rewards import Rewards

ORDER = ("gold", "heldout", "proxy")  # who decides the wins: the first that is there


@dataclass(frozen=True)
class Panel:
    """`rewards` by name: "proxy" was trained against, "heldout" was not."""

    rewards: dict[str, Reward | Rewards]
    judge: GoldJudge | None
    token_budget: int

    @classmethod
    def open(
        cls, *, proxy: RewardModel | Rewards | None, heldout: RewardModel | None, judge: Judge | None, token_budget: int
    ) -> Panel:
        given = {"proxy": proxy, "heldout": heldout}
        rewards = {name: r if isinstance(r, Rewards) else open_reward(r) for name, r in given.items() if r}
        return cls(rewards, GoldJudge.open(judge.data_files[0]) if judge else None, token_budget)

    @property
    def decisive(self) -> str | None:
        present = {*self.rewards, *(["gold"] if self.judge else [])}
        return next((name for name in ORDER if name in present), None)

    @property
    def networks(self) -> list[nn.Module]:
        """The reward models' modules."""
        return [m for r in self.rewards.values() for m in (r.networks if isinstance(r, Rewards) else [r.model])]

    def score(self, answered: Answered) -> None:
        for name, reward in self.rewards.items():
            add_reward(answered, name, reward, self.token_budget)
        if self.judge:
            add_gold(answered, self.judge)

    def scorecard(self, name: str, pairs: Sequence[Comparison]) -> dict[str, Any] | None:
        """How good a reward model is on held-out pairs, by their labels and, where there is one, by the judge."""
        reward = self.rewards.get(name)
        if not isinstance(reward, Reward):
            return None
        return scorecard(scored_pairs(pairs, reward, self.judge, self.token_budget))

    def best_of_n(
        self, name: str, sample: Callable[[], Answered], n: int, everyone: Sequence[Answered], seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A policy's best of 1 .. n by reward and by gold, and how far towards its best by gold everyone has gone.

        `sample` draws n answers of the policy called `name` to every prompt. Returns the table and the shares by
        policy.
        """
        found = sample()
        self.score(found)
        gold = found.scores["gold"]
        top = best_of_n_means(gold, gold, n)
        closed = {}
        for a in everyone:
            gap = share_of_gap(a.scores["gold"], gold, top, seed=seed)
            closed[a.name] = gap.to_json() if gap else None
        by = found.scores.get("proxy", gold)
        return {"policy": name, "rows": best_of_n(by, gold, seed=seed)}, closed
