"""Settings of rewards: what is refused while planning, before any function has run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.config import Settings, parse_settings
from pipeline.flow.errors import UserError
from pipeline.rollout.reward_settings import CHECKS, RewardSettings

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
raise RuntimeError("a plan must not run this")

def polite(prompt, text, stopped, answer, *, words, weight=1.0): ...
def short(prompt, text, stopped, answer, longest, least=0): ...
def anything(*given, **options): ...
def two(prompt, text): ...
async def later(prompt, text, stopped, answer): ...
def _own(prompt, text, stopped, answer): ...
class Judge: ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planned_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "planned_rewards"


def call(path: str, **arguments: Any) -> dict[str, Any]:
    return {"call": path, "arguments": arguments}


def parsed(**values: Any) -> RewardSettings:
    return parse_settings(RewardSettings, values, "settings.ppo.reward")


def test_by_default_a_score_is_left_alone():
    made = RewardSettings()
    assert (made.unfinished_score, made.clip, made.overlong, made.whiten) == (None, None, None, False)
    assert (made.combine, made.normalise, made.token_penalty, made.functions) == ("mean", "stored", 0.0, ())


def test_a_stage_keeps_its_own_default_when_something_else_is_set():
    class Config(Settings):
        reward: RewardSettings = RewardSettings(unfinished_score=-1.0)

    assert parse_settings(Config, {"reward": {"clip": 5}}, "ppo").reward.unfinished_score == -1.0
    assert parse_settings(Config, {"reward": {"unfinished_score": None}}, "ppo").reward.unfinished_score is None
    with pytest.raises(UserError, match=r"unfinished_score -1.0 replaces what unfinished_penalty 0.5 is taken off"):
        parse_settings(Config, {"reward": {"unfinished_penalty": 0.5}}, "ppo")


def test_functions_are_read_and_not_run(module: str):
    made = parsed(
        modules=[module],
        functions=[
            call(f"{CHECKS}.numeric_answer", after="####"),
            call(f"{module}.polite", words=["please"]),
            call(f"{module}.short", longest=3),
            call(f"{module}.anything", a=1),
            {**call(f"{module}.short", longest=9, least=1), "name": "shorter", "weight": -1},
        ],
    )
    assert [f.source for f in made.functions] == ["numeric_answer", "polite", "short", "anything", "shorter"]
    assert module not in sys.modules
    assert made.modules_named() == (module,)
    again = parse_settings(RewardSettings, made.model_dump(mode="json"), "worker")
    assert again == made and again.identity() == made.identity()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (call("os.system"), "functions: os.system is of a module that this plan does not allow"),
        (call("planned_reward.polite"), "does not allow; did you mean 'planned_rewards'?; to run its code, add"),
        (call("pipeline.rollout.checks.numeric_answr"), "no such function; did you mean 'numeric_answer'?"),
        (call("pipeline.rollout.checks._plain"), "defines no such function"),
        (call("planned_rewards._own"), "defines no such function"),
        (call("planned_rewards.later"), "defines no such function"),
        (call("planned_rewards.Judge"), "defines no such function"),
        (call("planned_rewards.two"), "it takes 2 positional arguments, but gets 4: prompt, text, stopped, answer"),
        (call("planned_rewards.polite"), "arguments: words must be given"),
        (call("planned_rewards.short"), "arguments: longest must be given"),
        (call("planned_rewards.polite", words=[], wieght=1), "it takes no 'wieght'; did you mean 'weight'?"),
        (call("planned_rewards.polite", words=[], text="x"), "it takes no 'text'"),
        (call("pipeline.rollout.checks.regular_expression", pattern="(a"), "is no regular expression"),
        (call("pipeline.rollout.checks.json_schema", schema={"format": "date"}), "schema.format: this keyword"),
        (call("planned_rewards.anything", a=float("nan")), "expected JSON values"),
        (call("exact_match"), "functions.0.call: String should match pattern"),
        (call("planned_rewards:polite"), "functions.0.call: String should match pattern"),
        ({"call": "planned_rewards.anything", "name": "proxy"}, "two scores are called 'proxy'"),
    ],
    ids=str,
)
def test_what_cannot_be_called_is_refused_while_planning(module: str, function: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        parsed(modules=[module], functions=[function])
    assert str(error.value).startswith("settings.ppo.reward") and message in str(error.value)
    assert module not in sys.modules


def test_two_scores_need_two_names(module: str):
    twice = [call(f"{module}.short", longest=1), call(f"{module}.short", longest=2)]
    with pytest.raises(UserError, match="two scores are called 'short'; give one of them another `name`"):
        parsed(modules=[module], functions=twice)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules": ["no_such_module"]}, "modules: no module 'no_such_module' with Python source"),
        ({"modules": ["math"]}, "modules: no module 'math' with Python source"),
        ({"overlong": {"budget": 4, "buffer": 5}}, "buffer 5 is longer than budget 4"),
        ({"overlong": {"budget": 4}}, "overlong.buffer"),
        ({"clip": 0}, "clip"),
        ({"combine": "median"}, "combine"),
        ({"weights": {"reward": True}}, "weights.reward: Input should be a valid number"),
        ({"unfinished_penalty": -1}, "unfinished_penalty"),
        ({"uncertainty": -1}, "uncertainty"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        parsed(**values)
    assert message in str(error.value)


def test_a_file_that_is_no_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_rewards.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="broken_rewards.py is not Python that can be read"):
        parsed(modules=["broken_rewards"], functions=[call("broken_rewards.f")])


def test_something_must_reward():
    RewardSettings().require_source("ppo", models=True)
    parsed(functions=[call(f"{CHECKS}.exact_match")]).require_source("ppo", models=False)
    with pytest.raises(UserError, match=r"ppo: nothing rewards an answer: wire a reward model .* ppo.reward.functions"):
        RewardSettings().require_source("ppo", models=False)


def test_every_setting_says_what_it_does_in_one_sentence():
    for name, info in RewardSettings.model_fields.items():
        assert (info.description or "").endswith("."), name


def test_checks_are_planned_without_torch():
    code = (
        "import sys; from pipeline.rollout.reward_settings import RewardSettings as R; "
        "R(functions=[{'call': 'pipeline.rollout.checks.exact_match'}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
