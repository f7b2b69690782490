"""Sources of reward, what they come to, and what is trained on; models of two thin layers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.groups import comparison_groups
from pipeline.data.records import Prompt, Sample
from pipeline.flow.errors import Damaged, NonFinite, UserError
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward, score_texts, write_probe
from pipeline.rollout.reward_settings import RewardSettings
from pipeline.rollout.rewards import FunctionSource, ModelSource, Rewards
from tests.small import artifact, ask, chat, comparison, policy, prompts, save, scorer

GROUPS = comparison_groups([comparison("q", "good", "bad")], chat(), 99).groups
SETTINGS = SamplingSettings(samples=3, max_new_tokens=4)


class Fixed:
    """A reward model that gives the numbers it was made with, by the answer's text."""

    def __init__(self, name: str, weight: float = 1.0, **scores: float) -> None:
        self.name, self.weight, self.by_text = name, weight, scores

    def scores(self, samples: Any, prompt_ids: Any, token_budget: int) -> list[float]:
        return [self.by_text[s.text] for s in samples]


def function(name: str, weight: float, call: Any, **arguments: Any) -> FunctionSource:
    return FunctionSource(name, weight, f"tests.{name}", call, arguments)


def sample(text: str, tokens: int = 2, stopped: bool = True, answer: str | None = None, **scores: float) -> Sample:
    ids = tuple(range(tokens))
    return Sample(Prompt("p17", ask("q"), answer=answer), 0, text, ids, (0.0,) * tokens, stopped, scores)


def made(*models: Any, functions: tuple[FunctionSource, ...] = (), **settings: Any) -> Rewards:
    return Rewards(models, functions, RewardSettings(**settings))


A, B = Fixed("reward", x=1.0, y=-2.0), Fixed("reward@b", x=3.0, y=-2.0)


# ------------------------------------------------------------------------------------------ sources, together


@pytest.mark.parametrize(
    ("settings", "x", "y"),
    [
        ({}, 2.0, -2.0),
        ({"combine": "worst"}, 1.0, -2.0),
        ({"combine": "uncertainty", "uncertainty": 0.5}, 1.5, -2.0),  # standard deviations 1 and 0
    ],
)
def test_reward_models_are_combined_and_keep_their_own_scores(settings: dict[str, Any], x: float, y: float):
    found = made(A, B, **settings).score([sample("x"), sample("y")])
    assert found == [{"proxy": x, "reward": 1.0, "reward@b": 3.0}, {"proxy": y, "reward": -2.0, "reward@b": -2.0}]
    assert list(found[0]) == ["proxy", "reward", "reward@b"]


def test_weights_and_functions_by_hand():
    """Mean of 2 * 1 and 3, and half of the text's length plus one: (2 + 3) / 2 + 0.5 * (1 + 1) = 3.5."""
    longer = function("longer", 0.5, lambda prompt, text, stopped, answer, more: len(text) + more, more=1)
    heavy = Fixed("reward", 2.0, x=1.0)
    found = made(heavy, B, functions=(longer,)).score([sample("x")])
    assert found == [{"proxy": 3.5, "reward": 1.0, "reward@b": 3.0, "longer": 2.0}]


def test_functions_alone_reward():
    seen = []

    def right(*given: Any) -> bool:
        seen.append(given)
        return given[1] == given[3]

    rewards = made(functions=(function("right", 2.0, right),))
    found = rewards.score([sample("4", answer="4"), sample("5", stopped=False, answer="4"), sample("6")])
    assert [f["proxy"] for f in found] == [2.0, 0.0, 0.0] and found[0] == {"proxy": 2.0}
    assert seen[1] == (ask("q"), "5", False, "4") and seen[2][3] is None
    assert rewards.networks == [] and rewards.names == ["right"]
    assert rewards.score([]) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "expected a finite number, but it returned nan"),
        (math.inf, "but it returned inf"),
        ("1", "but it returned '1'"),
        (None, "but it returned None"),
        (10**400, "expected a finite number, but it returned 1000"),
        (10**5000, "expected a finite number, but it returned a value of type int"),  # more digits than Python writes
        (ValueError("no name"), "ValueError: no name"),
        (SystemExit(0), "SystemExit: 0"),
    ],
    ids=lambda value: str(value) if not isinstance(value, int) else f"{value.bit_length()} bits",
)
def test_what_is_no_number_names_function_prompt_and_answer(value: Any, words: str):
    def bad(*given: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    rewards = made(functions=(function("bad", 0.0, bad),))
    with pytest.raises(UserError) as error:
        rewards.score([sample("a" * 80)])
    assert str(error.value).startswith(f"reward function tests.bad, prompt 'p17', answer 0 '{'a' * 60}...': ")
    assert words in str(error.value)


def test_a_function_that_changes_its_arguments_changes_no_later_score():
    """What it is given follows from the plan alone: a row that goes on scores as one that was never stopped."""

    def grows(prompt: Any, text: str, stopped: bool, answer: Any, words: list[str], options: dict[str, int]) -> float:
        words.append(text)
        options["calls"] += 1
        return len(words) + 10 * options["calls"]

    rewards = made(functions=(function("grows", 1.0, grows, words=["a"], options={"calls": 0}),))
    assert [found["proxy"] for found in rewards.score([sample("x"), sample("y")])] == [12.0, 12.0]


def test_a_reward_model_that_gives_no_number_is_named():
    role = scorer(1)
    source = ModelSource("reward", 1.0, Reward(role.module, chat(), math.nan), True)
    with pytest.raises(NonFinite, match="reward model reward, prompt 'p17', answer 0 'x': its score is nan"):
        made(source).score([sample("x")])


@pytest.mark.parametrize(
    ("models", "functions", "settings", "message"),
    [
        ([], [], {}, "nothing rewards an answer"),
        ([A, A], [], {}, "two scores are called 'reward'"),
        ([A], [function("reward", 1.0, len)], {}, "two scores are called 'reward'"),
        ([Fixed("proxy")], [], {}, "two scores are called 'proxy'"),
        ([A, B], [], {"weights": {"reward@c": 1.0}}, "no reward model is of row 'reward@c'; did you mean 'reward@b'"),
    ],
)
def test_sources_that_cannot_stand_together(models: Any, functions: Any, settings: Any, message: str):
    with pytest.raises(UserError) as error:
        Rewards(models, functions, RewardSettings(**settings))
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------- what is trained on


def scored(*scores: float, **given: Any) -> list[Sample]:
    return [sample("x", proxy=score, **given) for score in scores]


def test_by_default_it_is_the_score_to_the_last_bit():
    samples = [sample("x", proxy=0.1), sample("x", proxy=1 / 3, stopped=False)]
    assert made(A).total(samples) == [0.1, 1 / 3]
    assert made(A, unfinished_score=-1.0).total(samples) == [0.1, -1.0]
    assert made(A).total([]) == []


def test_all_terms_by_hand():
    """9 is cut to 5, loses 0.5 for 5 tokens and half of the overlong penalty of 2; an unfinished answer gets -1."""
    rewards = made(
        A, clip=5.0, token_penalty=0.1, overlong={"budget": 6, "buffer": 2, "penalty": 2.0}, unfinished_score=-1.0
    )
    samples = [sample("x", 5, proxy=9.0), sample("x", 900, stopped=False, proxy=9.0), sample("x", 2, proxy=0.5)]
    assert rewards.total(samples) == pytest.approx([3.5, -1.0, 0.3], abs=1e-12)


def test_running_statistics_by_hand_and_from_json_to_the_last_bit():
    """1, 3: mean 2, standard deviation 1. Then 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5."""
    settings: Any = {"normalise": "running", "unfinished_score": -1.0}
    rewards = made(A, **settings)
    assert rewards.total(scored(1.0, 3.0)) == pytest.approx([-1, 1], abs=1e-7)
    state = json.loads(json.dumps(rewards.state()))
    assert state == {"count": 2.0, "mean": 2.0, "squares": 2.0}
    expected = rewards.total(scored(5.0, 7.0))
    assert expected == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)], abs=1e-7)
    resumed = made(A, **settings)
    resumed.load_state(state)
    assert resumed.total(scored(5.0, 7.0)) == expected and resumed.state() == rewards.state()
    assert rewards.total(scored(9.0, stopped=False)) == [-1.0]  # exact, whatever the statistics say


def test_a_state_of_other_settings_is_refused():
    rewards = made(A)
    assert rewards.state() == {}
    rewards.load_state({})
    with pytest.raises(Damaged, match=r"hold \[\], but stored are \['count'\]"):
        rewards.load_state({"count": 1.0})
    with pytest.raises(Damaged, match="but stored are \\[\\]"):
        made(A, normalise="running").load_state({})


class Rank:
    def __init__(self, everyone: list[Any]) -> None:
        self.everyone = everyone

    def gather(self, value: Any) -> list[Any]:
        return [*self.everyone, value]


def test_all_ranks_take_the_first_ones_sums():
    """A rollout is on every rank: nothing is counted twice, and a last bit that differs elsewhere does not matter."""
    alone, second = made(A, normalise="running"), made(A, normalise="running")
    expected = alone.total(scored(1.0, 3.0), Rank([]))
    sums = [math.nextafter(4.0, 5.0), 10.0, 2.0]
    other = second.total(scored(1.0, 3.0), Rank([sums]))
    assert alone.state()["count"] == second.state()["count"] == 2.0
    assert second.state()["mean"] == sums[0] / 2 != 2.0
    assert other == pytest.approx(expected, abs=1e-12)


def test_whitening_by_hand():
    """1, 2, 3, 4, mean 2.5, standard deviation sqrt(1.25); an unfinished answer's score is whitened like any other."""
    samples = [*scored(1.0, 2.0, 3.0), sample("x", proxy=99.0, stopped=False)]
    white = [-1.3416407811, -0.4472135937, 0.4472135937, 1.3416407811]
    assert made(A, whiten=True, unfinished_score=4.0).total(samples) == pytest.approx(white, abs=1e-7)
    kept = made(A, whiten=True, shift_mean=False, unfinished_score=4.0).total(samples)
    assert kept == pytest.approx([x + 2.5 for x in white], abs=1e-7)


def test_a_sample_without_scores_is_named():
    with pytest.raises(UserError, match="prompt 'p17', answer 0 'x': it has no score 'proxy'"):
        made(A).total([sample("x", gold=1.0)])


# ------------------------------------------------------------------------------------- models and functions


def stored(directory: Path, seed: int, row: str | None = None, **facts: Any) -> Any:
    role = scorer(seed)
    save(directory, "reward_model", role.model)
    write_probe(role.module, GROUPS, directory)
    found = artifact(directory, "reward_model", shift=0.5, **facts)
    return found if row is None else replace(found, meta={**found.meta, "row": row})


def rollout(reward: Any, **options: Any) -> list[Sample]:
    asked = encode_prompts(prompts("a", "long question", "b"), chat(), 99, 9)
    return (
        Sampler(policy().model, chat(), SETTINGS, NoiseKey(0, "test"), reward=reward, **options).sample(asked).samples
    )


def test_one_reward_model_scores_as_it_does_alone_to_the_last_bit(tmp_path: Path):
    one = stored(tmp_path, 1)
    rewards = Rewards.open([one], RewardSettings(), one.lineage)
    assert rewards.rendered_again == [] and rewards.networks == [rewards.models[0].reward.model]
    together = rollout(rewards)
    alone = rollout(rewards.models[0].reward, token_budget=8192)
    assert [s.scores["proxy"] for s in together] == [s.scores["proxy"] for s in alone]
    assert all(set(s.scores) == {"proxy"} for s in together)  # one source needs no name of its own
    again = rewards.score(together)  # from the store: no ids of prompts at hand
    assert [f["proxy"] for f in again] == pytest.approx([s.scores["proxy"] for s in together], abs=1e-5)


@pytest.mark.parametrize("fact", ["tokenizer", "template"])
def test_another_tokenizer_or_template_gets_the_text(tmp_path: Path, fact: str):
    one, other = stored(tmp_path / "a", 1, "reward"), stored(tmp_path / "b", 2, "reward@b", **{fact: "other"})
    rewards = Rewards.open([one, other], RewardSettings(weights={"reward@b": 2.0}), one.lineage)
    assert rewards.names == ["reward", "reward@b"] and rewards.rendered_again == ["reward@b"]
    samples = rollout(rewards)
    wrong = [replace(s, ids=(9,) * len(s.ids)) for s in samples]  # ids of a tokenizer that the model does not have
    before, after = rewards.score(samples), rewards.score(wrong)
    assert [f["reward@b"] for f in before] == [f["reward@b"] for f in after]
    assert [f["reward"] for f in before] != [f["reward"] for f in after]
    assert [f["reward@b"] for f in before] == score_texts(rewards.models[1].reward, samples, 8192)
    for f in before:
        assert f["proxy"] == pytest.approx((f["reward"] + 2 * f["reward@b"]) / 2, abs=1e-12)


def test_a_policy_without_digests_shares_no_ids(tmp_path: Path):
    assert Rewards.open([stored(tmp_path, 1)], RewardSettings(), {}).rendered_again == ["reward_model"]


MODULE = """
from os import getcwd
from pipeline.rollout.checks import exact_match

def polite(prompt, text, stopped, answer, *, words=("please",)):
    return sum(word in text for word in words) / len(words)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "opened_rewards.py").write_text(MODULE)
    (tmp_path / "broken_at_import.py").write_text("def f(*given): ...\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "opened_rewards"


def test_functions_are_opened_by_their_import_path(module: str):
    settings = RewardSettings(
        modules=(module,),
        functions=(
            {"call": f"{module}.polite", "weight": 0.5, "arguments": {"words": ["please", "thanks"]}},
            {"call": "pipeline.rollout.checks.numeric_answer", "name": "sum"},
        ),
    )
    found = Rewards.open([], settings, {}).score([sample("4, please", answer="4")])
    assert found == [{"proxy": 1.25, "polite": 0.5, "sum": 1.0}]


def test_a_module_that_fails_and_a_function_of_another_module_are_refused(module: str):
    broken = RewardSettings(modules=("broken_at_import",), functions=({"call": "broken_at_import.f"},))
    with pytest.raises(UserError, match=r"broken_at_import.f: cannot be imported: ZeroDivisionError"):
        Rewards.open([], broken, {})
    call: Any = {"call": f"{module}.polite"}
    (allowed,) = RewardSettings(modules=(module,), functions=(call,)).functions
    smuggled = allowed.model_copy(update={"call": f"{module}.exact_match"})
    with pytest.raises(UserError, match="is defined in 'pipeline.rollout.checks', not in the module that the plan"):
        FunctionSource.open(smuggled)


def test_figures_of_a_rollout_tell_the_sources_apart():
    from pipeline.rollout.collect import figures

    found = figures([sample("x", **f) for f in made(A, B).score([sample("x"), sample("y")])])
    assert (found["score"], found["score/reward"], found["score/reward@b"]) == (0.0, -0.5, 0.5)
    assert "score/reward" not in figures([sample("x", **f) for f in made(A).score([sample("x")])])
