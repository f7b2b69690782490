"""Plans: wiring, precedence, fingerprints, and why a row is stale. The stages copy text; no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import pytest

from pipeline.flow import plan as flow_plan
from pipeline.flow import wiring
from pipeline.flow.artifacts import Comparisons, Documents, Policy, RewardModel
from pipeline.flow.config import Settings, module_names, not_identity
from pipeline.flow.errors import Damaged, UserError
from pipeline.flow.plan import Plan, Source, check_sources, load_plan, request, state_of, survey
from pipeline.flow.stage import OneOrMore, Stage, run_stage
from pipeline.flow.store import Store

ROOT = Path(__file__).resolve().parents[2]


class Loss(Settings):
    beta: float = 0.1


class Rewards(Settings):
    modules: tuple[str, ...] = module_names("Modules whose source decides the result.")


class Config(Settings):
    word: str = "w"
    loss: Loss = Loss()
    rewards: Rewards = Rewards()
    budget: int = not_identity(1, "not part of a row's identity")
    tokenizer: str = "t"


class Copy(Stage):
    """Every output is the text of all inputs and a word."""

    Config = Config

    def run(self, inputs: Any, workspace: Any) -> dict[str, Any]:
        texts = []
        for value in vars(inputs).values():
            for artifact in value if isinstance(value, list) else [value] if value else []:
                texts += [path.read_text() for path in artifact.paths if path.name != "tokenizer.json"]
        for slot in self.Outputs.__dataclass_fields__:
            (workspace.slot(slot) / "data.jsonl").write_text("".join(texts) + self.config.word + "\n")
            if slot in ("policy", "model"):
                (workspace.slot(slot) / "tokenizer.json").write_text(json.dumps({"v": self.config.tokenizer}))
        return {}


class World(Copy):
    name = "world"

    class Config(Settings):
        seed: int = 0
        facts: int = 3
        word: str = "world"

    @dataclass
    class Inputs:
        pass

    @dataclass
    class Outputs:
        documents: Documents
        comparisons: Comparisons


class Sft(Copy):
    name = "sft"

    @dataclass
    class Inputs:
        documents: Documents
        start: Policy | None = None

    @dataclass
    class Outputs:
        policy: Policy


class Reward(Copy):
    name = "reward"

    @dataclass
    class Inputs:
        policy: Policy
        comparisons: Comparisons

    @dataclass
    class Outputs:
        model: RewardModel


class Ppo(Copy):
    name = "ppo"
    same_tokenizer = (("policy", "reward"),)

    @dataclass
    class Inputs:
        policy: Policy
        reward: RewardModel

    @dataclass
    class Outputs:
        policy: Policy

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        if config.word == "bad":
            raise UserError("word: cannot be bad; set ppo.word")


class Several(Ppo):
    name = "several"

    @dataclass
    class Inputs:
        policy: Policy
        reward: OneOrMore[RewardModel] = field(default_factory=list)

    @classmethod
    def boundaries(cls, config: Any) -> tuple[tuple[str, ...], ...]:
        return () if config.word == "free" else (("policy", "reward[0]"),)


class Judge(Copy):
    name = "evaluate"

    @dataclass
    class Inputs:
        policies: list[Policy]
        reward: RewardModel | None = None
        others: list[Policy] = field(default_factory=list)

    @dataclass
    class Outputs:
        documents: Documents


STAGES = {cls.name: f"{__name__}:{cls.__name__}" for cls in (World, Sft, Reward, Ppo, Several, Judge)}

PLAN = """
sources:
  world: {kind: world, seed: 4}
  pairs: {kind: comparisons, path: pairs.jsonl}
rows:
  - sft:      {documents: world.documents}
  - reward:   {policy: sft.policy, comparisons: pairs}
  - ppo:      {policy: sft.policy, reward: reward.model}
  - evaluate: {policies: [sft.policy, ppo.policy], reward: reward.model}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("pairs\n")
    return tmp_path


def _plan(folder: Path, text: str = PLAN, *sets: str) -> Plan:
    (folder / "plan.yaml").write_text(text)
    return load_plan(folder / "plan.yaml", list(sets), STAGES)


def _run(plan: Plan, store: Store) -> list[str]:
    """What a runner does, in this process; the names of the rows that were computed."""
    computed, known = [], {}
    check_sources(plan)
    for row in plan.rows:
        state = state_of(plan, row, store, known)
        assert state.fingerprint is not None
        known[row.name] = state.fingerprint
        if state.status == "stale":
            asked = request(plan, row, store, known)
            assert asked.fingerprint == state.fingerprint
            store.prepare(asked)
            manifest = run_stage(asked, lambda event: None)
            assert manifest is not None
            store.seal(asked.fingerprint, manifest)
            computed.append(row.name)
    return computed


def _why(plan: Plan, store: Store) -> dict[str, str]:
    return {state.row: f"{state.status}: {state.why}" for state in survey(plan, store)}


# -------------------------------------------------------------------------------------------------- loading


def test_a_plan_is_rows_in_order_worlds_first(folder: Path) -> None:
    plan = _plan(folder)
    assert [row.name for row in plan.rows] == ["world", "sft", "reward", "ppo", "evaluate"]
    assert plan.name == "plan" and plan.seed == 0
    world = plan.row("world")
    assert (world.stage, world.seed, world.config.facts) == ("world", 4, 3)  # type: ignore[attr-defined]
    assert plan.sources["pairs"].paths == (folder / "pairs.jsonl",)
    assert [ref.text for ref in plan.row("evaluate").refs()] == ["sft.policy", "ppo.policy", "reward.model"]
    with pytest.raises(UserError, match="did you mean 'ppo'"):
        plan.row("pppo")


SHARED = PLAN.replace(
    "rows:", "  half: {kind: comparisons, same: pairs, part: [0.5, 1]}\n  asked: {kind: documents, same: pairs}\nrows:"
)


def test_a_source_reads_the_files_of_another_as_its_own_kind_and_part(folder: Path) -> None:
    plan = _plan(folder, SHARED)
    pairs, half, asked = (plan.sources[name] for name in ("pairs", "half", "asked"))
    assert half.paths == asked.paths == pairs.paths == (folder / "pairs.jsonl",)
    assert (half.kind, half.part, asked.kind, asked.part) == (Comparisons, (0.5, 1.0), Documents, None)
    moved = _plan(folder, SHARED, "sources.pairs.path=a.jsonl", "sources.pairs.format=hh", "sources.asked.path=b.txt")
    half, asked = moved.sources["half"], moved.sources["asked"]
    assert (half.paths[0].name, half.format) == ("a.jsonl", "hh")
    assert (asked.paths[0].name, asked.format, asked.same) == ("b.txt", None, None)  # a path of its own goes first


def test_a_mistyped_source_is_named(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        _plan(folder, PLAN, "sources.pair.path=a.jsonl")
    assert "sources.pair: no kind is given: a new source needs one; did you mean 'pairs'?" in str(error.value)


def test_what_several_sources_share_is_asked_for_once(folder: Path) -> None:
    text = SHARED.replace("path: pairs.jsonl", "path: null").replace("documents: world.documents", "documents: asked")
    with pytest.raises(UserError) as error:
        check_sources(_plan(folder, text))
    assert str(error.value) == "sources.pairs.path is not given; add --set sources.pairs.path=FILE"


@pytest.mark.parametrize(
    ("same", "message"),
    [
        ("pair", "plan.yaml:5: no source of files is called 'pair'; did you mean 'pairs'?"),
        ("world", "plan.yaml:5: no source of files is called 'world'"),
        (
            "asked",
            "plan.yaml:5: sources.half.same: 'asked' itself reads the files of 'pairs'; name a source with a path",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(folder: Path, same: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        _plan(folder, SHARED.replace("same: pairs, part", f"same: {same}, part"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("policy: sft.policy, comparisons: pairs", "policy: sft.policy, comparisons: sft.policy",
         "plan.yaml:7: row reward, input comparisons: expects Comparisons, but sft.policy is Policy; "
         "of that kind stand above: pairs, world.comparisons"),
        ("policy: sft.policy, comparisons: pairs", "policy: sft.policy",
         "plan.yaml:7: row reward, input comparisons: expects Comparisons, but nothing is given"),
        ("reward: reward.model}\n  - eval", "reward: reward.modle}\n  - eval",
         "plan.yaml:8: row ppo, input reward: expects RewardModel; nothing above is called 'reward.modle'; "
         "did you mean 'reward.model'?"),
        ("documents: world.documents", "documents: world.documents, start: ppo.policy",
         "plan.yaml:6: row sft, input start: expects Policy; 'ppo' does not stand above it; "
         "nothing of that kind stands above, only: pairs (Comparisons), world.documents (Documents)"),
        ("documents: world.documents", "documens: world.documents",
         "plan.yaml:6: row sft: there is no input 'documens'; did you mean 'documents'?"),
        ("[sft.policy, ppo.policy]", "sft.policy",
         "expects a list of Policy, but is 'sft.policy'; write [sft.policy]"),
        ("[sft.policy, ppo.policy]", "[sft.policy, sft.policy]", "names something twice"),
        ("[sft.policy, ppo.policy]", "[]", "nothing is given"),
        ("{documents: world.documents}", "{documents: [world.documents]}", "write one reference, not a list"),
        ("{documents: world.documents}", "{documents: 3}", "a reference is text"),
        ("- ppo:", "- ppoo:", "there is no stage 'ppoo'; did you mean 'ppo'?"),
        ("- ppo:", "- sft:", "row 'sft' stands twice; call the second sft@2"),
        ("- ppo:", "- ppo@A_B:", "STAGE or STAGE@LABEL"),
        ("- ppo:     ", "- ppo:\n    x:", "expected one `name: {inputs}`"),
        ("kind: comparisons", "kind: comparison", "plan.yaml:4: sources.pairs.kind: 'comparison' is none; "
         "did you mean 'comparisons'?"),
        ("path: pairs.jsonl", "pth: pairs.jsonl", "plan.yaml:4: sources.pairs: unknown key 'pth'"),
        ("path: pairs.jsonl", "path: a, base: gone", "no source is called 'gone'"),
        ("path: pairs.jsonl", "path: a, base: pairs",
         "plan.yaml:4: sources.pairs.base: a model cannot be its own base (pairs -> pairs)"),
        ("path: pairs.jsonl}", "base: a}\n  a: {kind: policy, base: b}\n  b: {kind: policy, base: a}",
         "plan.yaml:6: sources.b.base: a model cannot be its own base (pairs -> a -> b -> a)"),
        ("\nsources:", "\nlaunch: {threads: -1}\nsources:", "plan.yaml:2: launch.threads: Input should be"),
        ("\nsources:", "\nsettings: []\nsources:", "plan.yaml:2: settings: expected a mapping, found []"),
        ("kind: world, seed: 4", "kind: world, sed: 4", "plan.yaml:3: sources.world: unknown key 'sed'; did"),
        ("\nsources:", "\nsource:\n  a: 1\nsources:",
         "plan.yaml:2: unknown key 'source'; did you mean 'sources'?"),
        ("\nsources:", "\nppo: {word: x}\nsources:",
         "unknown key 'ppo'; settings of all its rows stand under `stages`, of one row under `settings`"),
        ("\nsources:", "\nstages: {ppo: {beta: 1}}\nsources:", "ppo: unknown key 'beta'; did you mean 'loss.beta'?"),
        ("\nsources:", "\nseed: x\nsources:", "plan.yaml:2: seed: expected int, found 'x'"),
        ("\nsources:", "\nsettings: {dppo: {}}\nsources:",
         "settings.dppo: there is no such row; did you mean 'ppo'?"),
        ("\nsources:", "\nsettings: {ppo: {wrod: x}}\nsources:",
         "plan.yaml:2: settings.ppo: unknown key 'wrod'; did you mean 'word'?"),
        ("\nsources:", "\nstages: {ppo: {loss: {bet: 1}}}\nsources:",
         "plan.yaml:2: settings.ppo.loss: unknown key 'bet'; did you mean 'beta'?"),
        ("\nsources:", "\nstages: {dpo: {beta: 1}}\nsources:", "stages.dpo: no such stage"),
        ("\nsources:", "\nsettings: {ppo: {word: bad}}\nsources:",
         "row ppo: word: cannot be bad; set ppo.word"),
        ("  pairs:", "  sft:", "a source has this name"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_in_words(folder: Path, old: str, new: str, message: str) -> None:
    assert PLAN.count(old) == 1
    with pytest.raises(UserError) as error:
        _plan(folder, PLAN.replace(old, new))
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_a_stage_without_a_row_still_has_its_keys_checked(folder: Path) -> None:
    text = PLAN[: PLAN.index("  - ppo:")]
    _plan(folder, text + "stages: {ppo: {word: x}}\n")
    with pytest.raises(UserError, match=r"stages\.ppo: unknown key 'wrod'"):
        _plan(folder, text + "stages: {ppo: {wrod: x}}\n")


def test_precedence_is_code_stages_settings_set(folder: Path) -> None:
    text = PLAN + "  - sft@2: {documents: world.documents}\n"
    text += "stages: {sft: {word: stage, loss: {beta: 1}}}\nsettings: {sft@2: {word: row}}\n"

    def found(*sets: str) -> list[tuple[str, float]]:
        plan = _plan(folder, text, *sets)
        configs: list[Any] = [plan.row(name).config for name in ("sft", "sft@2", "ppo")]
        return [(config.word, config.loss.beta) for config in configs]

    assert found() == [("stage", 1.0), ("row", 1.0), ("w", 0.1)]
    assert found("sft@2.loss.beta=2") == [("stage", 1.0), ("row", 2.0), ("w", 0.1)]
    assert found("stages.sft.word=all") == [("all", 1.0), ("all", 1.0), ("w", 0.1)]
    assert found("sft.word=one", "stages.sft.word=all") == [("one", 1.0), ("all", 1.0), ("w", 0.1)]
    assert found("settings.ppo.word=x") == [("stage", 1.0), ("row", 1.0), ("x", 0.1)]


def test_sets_reach_sources_seed_and_worlds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    sets = [
        "sources.pairs.path=../pairs.jsonl",
        "seed=9",
        "world.facts=5",
        "launch.threads=2",
        "skip_bad=true",
    ]
    plan = _plan(folder, PLAN, *sets)
    assert plan.sources["pairs"].paths == (folder / "pairs.jsonl",)
    assert _plan(folder, PLAN, "pairs.path=../pairs.jsonl").sources == plan.sources
    assert (plan.seed, plan.row("sft").seed, plan.row("world").seed) == (9, 9, 4)
    assert plan.row("world").config.facts == 5  # type: ignore[attr-defined]
    assert plan.launch == {"threads": 2} and plan.skip_bad
    assert plan.document["sources"]["world"]["facts"] == 5
    for bad, message in (
        ("pp.word=1", "--set pp.word=1: 'pp' is no row, no source and no part of a plan; did you mean 'ppo'?"),
        ("rows=[]", "'rows' is no row"),
        ("ppo=1", "--set ppo=1: 'ppo' holds settings; name one of them: --set ppo.KEY=VALUE"),
        ("pairs=x.jsonl", "'pairs' holds settings; name one of them: --set pairs.path=FILE"),
        ("world=1", "--set world=1: 'world' holds settings; name one of them: --set world.KEY=VALUE"),
        ("name=x", "--set name=x: a run is named by --name, or by `name:` in the plan file"),
        ("launch.threads=-1", "--set launch.threads=-1: launch.threads: Input should be greater than or equal to 1"),
        ("launch.x=1", "--set launch.x=1: launch: unknown key 'x'"),
        ("launch.processes=2", "--set launch.processes=2: launch.processes: 2, but launch.strategy is single"),
        ("seed=-1", f"--set seed=-1: seed: expected a number from 0 to {2**63 - 1}, found -1"),
        (f"seed={2**63}", f"seed: expected a number from 0 to {2**63 - 1}"),
        (f"world.seed={2**63}", f"sources.world.seed: expected a number from 0 to {2**63 - 1}"),
        ("ppo.loss.beta=true", "settings.ppo.loss.beta: Input should be a valid number (given: True)"),
        ("stages.ppo=[]", "stages.ppo: expected a mapping, found []"),
        ("stages.ppo=false", "stages.ppo: expected a mapping, found False"),
        ("settings.ppo=0", "settings.ppo: expected a mapping, found 0"),
        ("ppo.wrod=1", "--set ppo.wrod=1: settings.ppo: unknown key 'wrod'; did you mean 'word'?"),
    ):
        with pytest.raises(UserError) as error:
            _plan(folder, PLAN, bad)
        assert message in str(error.value)


def test_a_source_without_a_file_plans_and_does_not_run(folder: Path) -> None:
    store = Store(folder / "store")
    plan = _plan(folder, PLAN.replace(", path: pairs.jsonl", ""))
    _run(_plan(folder, PLAN[: PLAN.index("  - reward:")]), store)
    state = survey(plan, store)[2]
    assert (state.status, state.waits_for) == ("pending", "sources.pairs")
    for act in (lambda: check_sources(plan), lambda: request(plan, plan.row("reward"), store)):
        with pytest.raises(UserError, match=r"--set sources\.pairs\.path=FILE"):
            act()
    with pytest.raises(UserError, match="there is no file"):
        check_sources(_plan(folder, PLAN, "sources.pairs.path=gone.jsonl"))
    model = Source("base", Policy, (folder / "pairs.jsonl",))
    assert model.missing() == f"sources.base.path: {folder}/pairs.jsonl is no directory, as a model is"


# ---------------------------------------------------------------------------------- fingerprints and survey


def test_a_second_run_computes_nothing_and_pending_rows_say_what_they_wait_for(folder: Path) -> None:
    store, plan = Store(folder / "store"), _plan(folder)
    states = survey(plan, store)
    assert [(s.row, s.status, s.waits_for) for s in states] == [
        ("world", "stale", None),
        ("sft", "pending", "world"),
        ("reward", "pending", "sft"),
        ("ppo", "pending", "sft"),
        ("evaluate", "pending", "sft"),
    ]
    assert states[0].why == "never run" and states[1].fingerprint is None
    assert _run(plan, store) == ["world", "sft", "reward", "ppo", "evaluate"]
    assert _run(_plan(folder), Store(store.root)) == []
    assert {state.status for state in survey(plan, Store(store.root))} == {"fresh"}
    assert _run(_plan(folder, PLAN, "ppo.budget=7"), store) == []


def test_one_byte_of_the_preference_file_reruns_what_reads_it(folder: Path) -> None:
    store = Store(folder / "store")
    _run(_plan(folder), store)
    (folder / "pairs.jsonl").write_text("pairz\n")
    plan = _plan(folder)
    assert _why(plan, store) == {
        "world": "fresh: sealed",
        "sft": "fresh: sealed",
        "reward": "stale: input comparisons changed",
        "ppo": "pending: waits for reward",
        "evaluate": "pending: waits for ppo",
    }
    assert _run(plan, store) == ["reward", "ppo", "evaluate"]


def test_settings_seeds_and_the_nearest_earlier_row_are_told(folder: Path) -> None:
    store = Store(folder / "store")
    _run(_plan(folder), store)
    assert _why(_plan(folder, PLAN, "ppo.loss.beta=0.2"), store)["ppo"] == "stale: settings.loss.beta 0.1 -> 0.2"
    _run(_plan(folder, PLAN, "ppo.loss.beta=0.2"), store)
    why = _why(_plan(folder, PLAN, "ppo.loss.beta=0.2", "ppo.word=z"), store)["ppo"]
    assert why == "stale: settings.word w -> z"  # against the second, which is nearer
    assert _why(_plan(folder, PLAN, "seed=1"), store)["sft"] == "stale: seed 0 -> 1"
    assert _why(_plan(folder, PLAN, "seed=1"), store)["world"] == "fresh: sealed"  # it has a seed of its own
    assert _why(_plan(folder, PLAN, "sources.pairs.format=hh"), store)["reward"] == "stale: format of pairs added"


def test_rows_sealed_without_skipping_stand_with_it_but_not_the_other_way_round(folder: Path) -> None:
    store = Store(folder / "store")
    _run(_plan(folder), store)
    assert (
        _why(_plan(folder, PLAN, "skip_bad=true"), store)["reward"] == "fresh: sealed, and no row of its files was bad"
    )
    assert _run(_plan(folder, PLAN, "skip_bad=true"), store) == []
    assert _run(_plan(folder, PLAN, "skip_bad=true", "seed=1"), store) != []
    assert _why(_plan(folder, PLAN, "seed=1"), store)["reward"] == "stale: skip_bad True -> False"


def test_a_row_of_another_chain_is_no_earlier_version() -> None:
    one = {"stage": "s", "version": 1, "seed": 0, "schema": 1, "settings": {"a": 1}, "code": {}}
    one["inputs"] = {"x": "d1", "y": "d2"}
    elsewhere = {**one, "inputs": {"x": "e1", "y": "e2"}}
    assert flow_plan._why([one], {**elsewhere, "settings": {"a": 2}}) == "never run on these inputs"
    assert flow_plan._why([one], elsewhere) == "input x changed; input y changed"
    half = {**one, "settings": {"a": 2}, "inputs": {"x": "d1", "y": "e2"}}
    assert flow_plan._why([one], half) == "settings.a 1 -> 2; input y changed"


def test_equal_results_stop_the_wave(folder: Path) -> None:
    """A row that comes out the same leaves the rows below fresh: inputs count by content."""
    store = Store(folder / "store")
    _run(_plan(folder), store)
    assert _run(_plan(folder, PLAN, "sft.loss.beta=5"), store) == ["sft"]


def test_changed_code_is_named_and_accepted_only_by_an_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "pipeline"
    (package / "algo").mkdir(parents=True)
    (package / "algo/preference.py").write_text("x = 1\n")
    monkeypatch.setattr(wiring, "PACKAGE", package)
    monkeypatch.setattr(Reward, "sources", ("algo",))
    store = Store(folder / "store")
    _run(_plan(folder), store)
    assert "algo/preference.py" in _plan(folder).row("reward").code
    (package / "algo/preference.py").write_text("x = 2\n")
    plan = _plan(folder)
    assert _why(plan, store)["reward"] == "stale: code of algo/preference.py changed"
    states = survey(plan, store, accept_code=True)
    assert {state.status for state in states} == {"fresh"}
    assert states[2].why == "code of algo/preference.py changed: accepted as unchanged"
    assert store.is_sealed(states[2].fingerprint or "")
    (package / "algo/new.py").write_text("")
    assert "code of algo/new.py added" in _why(_plan(folder), store)["reward"]
    changed = _plan(folder, PLAN, "reward.word=z")
    assert survey(changed, store, accept_code=True)[2].status == "stale"


def test_the_source_of_a_module_that_settings_name_is_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of a reward function's file makes the row stale; planning never runs it."""
    source = folder / "stated_rewards.py"
    source.write_text("raise RuntimeError('must not run')\nx = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    store = Store(folder / "store")
    _run(_plan(folder), store)
    named = ["ppo.rewards.modules=[stated_rewards]"]
    why = _why(_plan(folder, PLAN, *named), store)["ppo"]
    assert why == ("stale: settings.rewards.modules [] -> ['stated_rewards']; code of module stated_rewards added")
    _run(_plan(folder, PLAN, *named), store)
    plan = _plan(folder, PLAN, *named)
    assert _why(plan, store)["ppo"] == "fresh: sealed"
    source.write_text("raise RuntimeError('must not run')\nx = 2\n")
    assert _why(_plan(folder, PLAN, *named), store)["ppo"] == "stale: code of module stated_rewards changed"
    source.unlink()
    with pytest.raises(UserError, match="no module 'stated_rewards' with Python source"):
        _plan(folder, PLAN, *named)


SEVERAL = PLAN.replace("  - ppo:", "  - reward@b: {policy: sft.policy, comparisons: pairs}\n  - several:").replace(
    "[sft.policy, ppo.policy]", "[sft.policy, several.policy]"
)


@pytest.mark.parametrize(
    ("given", "refs"),
    [
        ("reward.model", ["reward.model"]),
        ("[reward.model]", ["reward.model"]),
        ("[reward@b.model, reward.model]", ["reward@b.model", "reward.model"]),
        ("[]", None),
        ("null", None),
    ],
)
def test_one_or_more_stand_with_and_without_brackets(folder: Path, given: str, refs: list[str] | None) -> None:
    text = SEVERAL.replace("reward: reward.model}\n  - eval", f"reward: {given}}}\n  - eval")
    plan = _plan(folder, text)
    found = plan.row("several").inputs["reward"]
    assert [ref.text for ref in found] == refs if isinstance(found, list) else refs is None
    store = Store(folder / "store")
    _run(plan, store)
    if refs:
        entries = request(plan, plan.row("several"), store).inputs["reward"]
        assert [entry["meta"]["ref"] for entry in entries] == refs
        assert [entry["meta"]["row"] for entry in entries] == [ref.partition(".")[0] for ref in refs]


def test_one_reference_is_the_list_of_it(folder: Path) -> None:
    store = Store(folder / "store")
    _run(_plan(folder, SEVERAL), store)
    same = SEVERAL.replace("reward: reward.model}\n  - eval", "reward: [reward.model]}\n  - eval")
    assert same != SEVERAL and _run(_plan(folder, same), store) == []


def test_settings_may_say_which_tokenizers_must_agree(folder: Path) -> None:
    """Only the first reward model lends its weights to the value model; others may have tokenizers of their own."""
    both = SEVERAL.replace("reward: reward.model}\n  - eval", "reward: [reward.model, reward@b.model]}\n  - eval")
    _run(_plan(folder, both, "reward@b.tokenizer=other"), Store(folder / "one"))
    with pytest.raises(UserError, match=r"row several: sft.policy and reward.model must have the same tokenizer"):
        _run(_plan(folder, both, "reward.tokenizer=other"), Store(folder / "two"))
    _run(_plan(folder, both, "reward.tokenizer=other", "several.word=free"), Store(folder / "three"))


def test_the_order_and_names_of_a_list_are_identity(folder: Path) -> None:
    store = Store(folder / "store")
    _run(_plan(folder), store)
    turned = PLAN.replace("[sft.policy, ppo.policy]", "[ppo.policy, sft.policy]")
    assert _why(_plan(folder, turned), store)["evaluate"] == "stale: input policies changed"


def test_a_damaged_row_is_not_fresh(folder: Path) -> None:
    store, plan = Store(folder / "store"), _plan(folder)
    _run(plan, store)
    path = next((store.root / "rows").glob("*/policy/data.jsonl"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"w", b"v", 1))
    with pytest.raises(Damaged, match="policy/data.jsonl"):
        survey(plan, Store(store.root))


def test_tokenizers_must_agree_where_ids_cross(folder: Path) -> None:
    store = Store(folder / "store")
    with pytest.raises(UserError) as error:
        _run(_plan(folder, PLAN, "reward.tokenizer=other"), store)
    for words in ("row ppo: sft.policy and reward.model must have the same tokenizer", "cross between them"):
        assert words in str(error.value)
    assert error.value.exit_code == 2


# ------------------------------------------------------------------------------------------------- requests


def test_a_request_holds_all_that_a_worker_needs(folder: Path) -> None:
    store, plan = Store(folder / "store"), _plan(folder)
    with pytest.raises(UserError, match="row ppo cannot run: waits for sft"):
        request(plan, plan.row("ppo"), store)
    _run(plan, store)
    asked = request(plan, plan.row("reward"), store)
    policy, pairs = asked.inputs["policy"], asked.inputs["comparisons"]
    assert policy["meta"]["ref"] == "sft.policy" and policy["meta"]["row"] == "sft"
    assert pairs["locations"] == [str(folder / "pairs.jsonl")]
    assert asked.places == {pairs["digest"]: [str(folder / "pairs.jsonl")]}
    world = survey(plan, store)[0].fingerprint
    assert asked.roots == sorted([world, pairs["digest"]])
    json.dumps(asked.identity)
    evaluated = request(plan, plan.row("evaluate"), store)
    assert [entry["meta"]["ref"] for entry in evaluated.inputs["policies"]] == ["sft.policy", "ppo.policy"]
    assert evaluated.inputs["others"] is None


def test_planning_imports_no_torch() -> None:
    code = "import sys; from pipeline.flow import plan, store, wiring; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_settings_validate_with_pydantic_alone() -> None:
    with pytest.raises(pydantic.ValidationError):
        Config(nope=1)  # type: ignore[call-arg]
