"""What a policy stage looks at while it trains, and what the best weights are chosen by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.evaluate.panel import Panel
from pipeline.evaluate.watch import Watch
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward
from tests.small import chat, forget_gradients, policy, prompts, scorer


def watch(*names: str, budget: float | None = None, seed: int = 0) -> Watch:
    rewards = {name: Reward(scorer(i).module, chat(), 0.0) for i, name in enumerate(names)}
    sampling = SamplingSettings(max_new_tokens=5)
    panel, reference = Panel(rewards, None, 64), forget_gradients(policy())
    return Watch(
        forget_gradients(policy(seed)),
        prompts("a", "b", "c"),
        panel,
        reference,
        sampling,
        NoiseKey(0, "dev"),
        99,
        64,
        budget,
    )


def test_a_policy_is_seen_with_its_scores_and_its_kl():
    found = watch("proxy", "heldout")()
    assert set(found) == {"proxy", "heldout", "length", "stop_rate", "kl", "choice"}
    assert found["choice"] == found["heldout"]
    assert found["kl"] == 0.0  # the reference itself
    assert watch("proxy", seed=3)()["kl"] > 0


def test_the_heldout_model_chooses_and_the_proxy_where_there_is_none():
    assert watch("proxy", "heldout").chosen_by == "heldout" and watch("proxy").chosen_by == "proxy"
    assert watch("proxy", "heldout").choice({"proxy": 9.0, "heldout": 1.0, "gold": 5.0}) == 1.0
    assert watch().chosen_by is None and watch().choice({"gold": 1.0}) == -math.inf


def test_a_policy_beyond_the_budget_is_never_the_best():
    within, beyond = {"heldout": 1.0, "kl": 2.0}, {"heldout": 3.0, "kl": 2.1}
    made = watch("heldout", budget=2.0)
    assert made.choice(within) == 1.0 and made.choice(beyond) == -math.inf
    assert watch("heldout").choice(beyond) == 3.0


def seen(made: Watch, proxy: list[float], heldout: list[float]) -> str | None:
    table = lambda values: np.array(values)[:, None]
    made._compare({"proxy": table(proxy), "heldout": table(heldout)})
    return made.parted


def test_it_says_when_proxy_and_heldout_part():
    """Held-out best at 1, then falling on every prompt while proxy rises on every prompt."""
    made = watch("proxy", "heldout")
    assert seen(made, [0.0, 0.1, 0.2], [1.0, 1.1, 1.2]) is None
    assert seen(made, [0.5, 0.7, 0.6], [1.3, 1.3, 1.3]) is None  # both rise
    assert seen(made, [0.6, 0.7, 0.5], [1.2, 1.4, 1.2]) is None  # within chance
    said = seen(made, [1.5, 1.8, 1.7], [0.9, 0.8, 1.0])
    assert said is not None and "0.600 -> 1.667" in said and "1.300 -> 0.900" in said


def test_a_row_records_its_choice_and_says_where_there_was_none():
    said: list[str] = []
    made = watch("heldout", budget=2.0)
    made.say = said.append
    made.choice({"heldout": 1.0, "kl": 2.5})
    assert "chosen_by" not in made.chosen(8, chose=False, looked=1) and "within kl_budget" in said[0]
    made.choice({"heldout": 1.0, "kl": 1.5})
    assert made.chosen(4, chose=True, looked=2) == {
        "parted": None, "kl_budget": 2.0, "kept_step": 4, "dev_prompts": 3, "chosen_by": "heldout",
    }  # fmt: skip
    assert len(said) == 1 and "chosen_by" not in watch().chosen(8, chose=True, looked=1)


def test_a_stopped_row_remembers_what_it_saw():
    made, again = watch("proxy", "heldout"), watch("proxy", "heldout")
    seen(made, [0.0, 0.1], [1.0, 1.1])
    again.load(made.state())
    assert seen(again, [1.0, 1.2], [0.1, 0.3]) == seen(made, [1.0, 1.2], [0.1, 0.3]) != None  # noqa: E711
    fresh: Any = watch("proxy")
    fresh.load(fresh.state())
    assert fresh.state() == {"best": None, "parted": None, "within": False}


@pytest.mark.parametrize("scores", [{"proxy": [1.0]}, {"heldout": [1.0]}])
def test_one_kind_of_score_cannot_part(scores: dict[str, list[float]]):
    made = watch("proxy")
    made._compare({k: np.array(v)[:, None] for k, v in scores.items()})
    assert made.parted is None
