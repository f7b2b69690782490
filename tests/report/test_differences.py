from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from pipeline.flow.artifacts import canonical, sha256_bytes
from pipeline.report.differences import UNSET, Change, Figure, Side, compare, flat, is_time, policies_grid, same

NAN = float("nan")


class World:
    """Runs of `sft -> reward -> ppo` on one file, with digests made of what they come from: nothing is stored."""

    def __init__(self) -> None:
        self.manifests: dict[str, dict[str, Any]] = {}

    def row(
        self, name: str, settings: dict[str, Any], inputs: dict[str, Any], *, files: dict[str, str] | None = None,
        metrics: dict[str, Any] | None = None, seed: int = 0, code: dict[str, str] | None = None, same_result: str = "",
        environment: dict[str, Any] | None = None, beside: dict[str, Any] | None = None, slot: str = "policy",
    ) -> tuple[str, str]:  # fmt: skip
        """(fingerprint, digest of its output). `same_result` gives rows of different settings one output."""
        identity = {
            "schema": 1, "stage": name.partition("@")[0], "version": 1, "code": code or {"algo/kl.py": "1"},
            "settings": settings, "inputs": inputs, "seed": seed,
        }  # fmt: skip
        fingerprint = sha256_bytes(canonical(identity))
        digest = sha256_bytes(canonical([slot, same_result or fingerprint]))
        self.manifests[fingerprint] = {
            "row": name, "identity": identity, "settings": {**settings, **(beside or {})}, "inputs": inputs,
            "places": {d: [path] for path, d in (files or {}).items()}, "outputs": {slot: {"digest": digest}},
            "metrics": metrics or {}, "environment": environment or {"threads": "1"}, "started": 10.0, "finished": 12.5,
        }  # fmt: skip
        return fingerprint, digest

    def chain(self, run: str, rate: float = 0.001, pairs: str = "p1", **ppo: Any) -> Side:
        sft, policy = self.row("sft", {"train": {"learning_rate": rate, "betas": [0.9, 0.95]}}, {"data": "d1"},
                               files={"chats.jsonl": "d1"}, metrics={"loss": rate * 100})  # fmt: skip
        reward, model = self.row("reward", {"epochs": 1}, {"policy": policy, "comparisons": pairs},
                                 files={"pairs.jsonl": pairs}, slot="model")  # fmt: skip
        last, _ = self.row("ppo", {"kl": {"coefficient": 0.1}}, {"policy": policy, "reward": model}, **ppo)
        return self.side(run, sft=sft, reward=reward, ppo=last)

    def side(self, run: str, **rows: str) -> Side:
        return Side(run, rows, self.manifests)


@pytest.fixture
def world() -> World:
    return World()


def told(differences: Any, row: str) -> Any:
    return next(found for found in differences.rows if found.row == row)


def test_a_difference_is_told_where_it_starts(world: World) -> None:
    """sft's rate 0.001 -> 0.002: reward reads sft, ppo reads both; they differ since sft and in nothing else."""
    found = compare(world.chain("a"), world.chain("b", rate=0.002))
    assert found.starts == ["sft"] and not found.identical
    sft, reward, ppo = found.rows
    assert sft.status == "differs" and sft.own == [Change("setting", "train.learning_rate", 0.001, 0.002)]
    assert (reward.status, reward.own) == (ppo.status, ppo.own) == ("inputs", [])
    assert [i.document() for i in ppo.inputs] == [
        {"slot": "policy", "from": "sft", "starts": ["sft"]},
        {"slot": "reward", "from": "reward", "starts": ["sft"]},
    ]


def test_two_beginnings_are_both_named_in_the_plans_order(world: World) -> None:
    found = compare(world.chain("a"), world.chain("b", rate=0.002, pairs="p2"))
    assert found.starts == ["sft", "reward"]
    assert told(found, "reward").own == [Change("input", "comparisons", "pairs.jsonl (p1)", "pairs.jsonl (p2)")]
    assert {i.slot: i.starts for i in told(found, "ppo").inputs} == {"policy": ("sft",), "reward": ("sft", "reward")}


def test_one_and_the_same_row_is_identical_whatever_it_is_called_in(world: World) -> None:
    found = compare(world.chain("a"), world.chain("b"))
    assert found.identical and [row.status for row in found.rows] == ["identical"] * 3 and found.starts == []
    half = compare(world.chain("a"), world.chain("b", seed=7))
    assert [row.status for row in half.rows] == ["identical", "identical", "differs"]
    assert told(half, "ppo").own == [Change("seed", "seed", 0, 7)]


def test_an_equal_result_of_other_settings_ends_the_difference(world: World) -> None:
    """Both sft rows gave the same bytes, so ppo read the same and is one row."""
    a, digest = world.row("sft", {"note": "x"}, {}, same_result="r")
    b, _ = world.row("sft", {"note": "y"}, {}, same_result="r")
    ppo, _ = world.row("ppo", {}, {"policy": digest})
    found = compare(world.side("a", sft=a, ppo=ppo), world.side("b", sft=b, ppo=ppo))
    assert [row.status for row in found.rows] == ["differs", "identical"]
    assert told(found, "sft").document()["outputs"] == [{"slot": "policy", "a": digest, "b": digest, "same": True}]


def test_another_row_behind_an_input_is_a_difference_of_the_reader(world: World) -> None:
    """ppo from sft.policy in a, from sft@two.policy in b: the wiring differs, not a row above."""
    one, first = world.row("sft", {"x": 1}, {})
    two, second = world.row("sft@two", {"x": 2}, {})
    pa, _ = world.row("ppo", {}, {"policy": first})
    pb, _ = world.row("ppo", {}, {"policy": second})
    rows = {"sft": one, "sft@two": two}
    found = compare(Side("a", {**rows, "ppo": pa}, world.manifests), Side("b", {**rows, "ppo": pb}, world.manifests))
    assert told(found, "ppo").own == [Change("input", "policy", "sft.policy", "sft@two.policy")]
    assert found.starts == ["ppo"]


def test_of_two_rows_with_one_result_the_shared_one_is_meant(world: World) -> None:
    """In a, `copy` made the very bytes that sft made; in b sft alone changed: ppo differs since sft, not by wiring."""
    sa, digest = world.row("sft", {"x": 1}, {}, same_result="r")
    copy_a, _ = world.row("copy", {}, {}, same_result="r")
    sb, other = world.row("sft", {"x": 2}, {})
    pa, _ = world.row("ppo", {}, {"policy": digest})
    pb, _ = world.row("ppo", {}, {"policy": other})
    found = compare(world.side("a", copy=copy_a, sft=sa, ppo=pa), world.side("b", copy=copy_a, sft=sb, ppo=pb))
    assert told(found, "ppo").own == [] and told(found, "ppo").inputs[0].origin == "sft"


def test_an_input_of_an_earlier_version_of_a_row_is_traced_in_the_store(world: World) -> None:
    """b's ppo still stands on the sft of 0.002, though b's sft is a's by now."""
    a, b = world.chain("a"), world.chain("b", rate=0.002)
    found = compare(a, Side("b", {**b.rows, "sft": a.rows["sft"], "reward": a.rows["reward"]}, world.manifests))
    assert [row.status for row in found.rows] == ["identical", "identical", "inputs"]
    assert told(found, "ppo").inputs[0].document() == {"slot": "policy", "from": "sft", "starts": ["sft"]}


def test_a_row_that_hands_on_its_input_is_not_its_own_origin(world: World) -> None:
    """echo writes the very bytes that it read, which sft made; of sft only the store knows."""
    _, one = world.row("sft", {"x": 1}, {}, same_result="r")
    _, two = world.row("sft", {"x": 2}, {}, same_result="s")
    ea, _ = world.row("echo", {}, {"policy": one}, same_result="r")
    eb, _ = world.row("echo", {}, {"policy": two}, same_result="s")
    found = compare(world.side("a", echo=ea), world.side("b", echo=eb))
    assert told(found, "echo").inputs[0].document() == {"slot": "policy", "from": "sft", "starts": ["sft"]}


def test_files_of_the_user_are_files_even_where_a_row_made_the_same(world: World) -> None:
    _, one = world.row("sft", {"x": 1}, {})
    _, two = world.row("sft", {"x": 2}, {})
    pa, _ = world.row("ppo", {}, {"policy": one}, files={"kept/one": one})
    pb, _ = world.row("ppo", {}, {"policy": two}, files={"kept/two": two})
    (change,) = told(compare(world.side("a", ppo=pa), world.side("b", ppo=pb)), "ppo").own
    assert (change.a, change.b) == (f"kept/one ({one[:12]})", f"kept/two ({two[:12]})")


def test_names_and_their_order_count_in_a_list_of_inputs(world: World) -> None:
    """evaluate reads [sft, dpo] or [dpo, sft]: the same digests, another row (the first is the reference)."""
    (s, sft), (d, dpo) = world.row("sft", {}, {}), world.row("dpo", {}, {})
    one, _ = world.row("evaluate", {}, {"policies": [["sft.policy", sft], ["dpo.policy", dpo]]})
    two, _ = world.row("evaluate", {}, {"policies": [["dpo.policy", dpo], ["sft.policy", sft]]})
    rows = {"sft": s, "dpo": d}
    found = compare(
        Side("a", {**rows, "evaluate": one}, world.manifests), Side("b", {**rows, "evaluate": two}, world.manifests)
    )
    names = ["sft.policy", "dpo.policy"]
    assert told(found, "evaluate").own == [Change("input", "policies", names, names[::-1])]
    assert told(found, "evaluate").inputs == []


def test_members_of_a_list_are_compared_by_name_not_by_place(world: World) -> None:
    """[sft, dpo] against [dpo'] with another dpo: sft went, dpo differs since dpo; sft and dpo' are never a pair."""
    (s, sft), (d, dpo), (e, other) = world.row("sft", {}, {}), world.row("dpo", {}, {}), world.row("dpo", {"b": 1}, {})
    one, _ = world.row("evaluate", {}, {"policies": [["sft.policy", sft], ["dpo.policy", dpo]]})
    two, _ = world.row("evaluate", {}, {"policies": [["dpo.policy", other]]})
    found = compare(world.side("a", sft=s, dpo=d, evaluate=one), world.side("b", sft=s, dpo=e, evaluate=two))
    row = told(found, "evaluate")
    assert row.own == [Change("input", "policies", ["sft.policy", "dpo.policy"], ["dpo.policy"])]
    assert [(i.slot, i.origin) for i in row.inputs] == [("policies[dpo.policy]", "dpo")]


def test_an_optional_input_is_there_or_unset(world: World) -> None:
    sft, digest = world.row("sft", {}, {})
    one, _ = world.row("dpo", {}, {"policy": digest})
    two, _ = world.row("dpo", {}, {"policy": digest, "heldout": "h1"}, files={"held.jsonl": "h1"})
    found = compare(world.side("a", sft=sft, dpo=one), world.side("b", sft=sft, dpo=two))
    (change,) = told(found, "dpo").own
    assert change.document() == {"what": "input", "name": "heldout", "b": "held.jsonl (h1)"}


def test_settings_of_every_shape(world: World) -> None:
    one = {"betas": [0.9, 0.95], "steps": None, "sources": [{"w": 1}, {"w": 2}], "epochs": 1, "old": 3}
    two = {"betas": [0.95, 0.9], "steps": 0, "sources": [{"w": 1}, {"w": 5}], "epochs": 1.0, "new": None}
    a, b = world.row("sft", one, {})[0], world.row("sft", two, {})[0]
    changes = told(compare(world.side("a", sft=a), world.side("b", sft=b)), "sft").own
    assert [c.document() for c in changes] == [
        {"what": "setting", "name": "betas", "a": [0.9, 0.95], "b": [0.95, 0.9]},
        {"what": "setting", "name": "steps", "a": None, "b": 0},
        {"what": "setting", "name": "sources[1].w", "a": 2, "b": 5},
        {"what": "setting", "name": "old", "a": 3},
        {"what": "setting", "name": "new", "b": None},
    ]


def test_a_row_that_differs_in_spelling_alone_still_says_why(world: World) -> None:
    """1 and 1.0 are one value, but two fingerprints."""
    a, b = world.row("sft", {"epochs": 1}, {})[0], world.row("sft", {"epochs": 1.0}, {})[0]
    found = compare(world.side("a", sft=a), world.side("b", sft=b))
    assert told(found, "sft").own == [Change("spelling", "settings.epochs", 1, 1.0)] and found.starts == ["sft"]


def test_code_by_file_and_environment_beside(world: World) -> None:
    settings: dict[str, Any] = {"x": 1}
    a, _ = world.row("sft", settings, {}, code={"algo/kl.py": "1", "train/loop.py": "1", "algo/old.py": "1"},
                     environment={"packages": {"torch": "2.1"}, "world": 1}, beside={"token_budget": 8})  # fmt: skip
    b, _ = world.row("sft", settings, {}, code={"algo/kl.py": "2", "train/loop.py": "1", "algo/new.py": "1"},
                     environment={"packages": {"torch": "2.2"}, "world": 1}, beside={"token_budget": 9})  # fmt: skip
    row = told(compare(world.side("a", sft=a), world.side("b", sft=b)), "sft")
    assert [(c.what, c.name) for c in row.own] == [(("code"), f"algo/{n}.py") for n in ("kl", "old", "new")]
    assert row.own[1].b is UNSET and row.own[2].a is UNSET
    assert row.environment == [
        Change("environment", "packages.torch", "2.1", "2.2"),
        Change("environment", "settings.token_budget", 8, 9),
    ]


def test_rows_of_one_run_alone_and_rows_not_sealed(world: World) -> None:
    a, b = world.chain("a"), world.chain("b", rate=0.002)
    manifests = {fp: m for fp, m in world.manifests.items() if fp != b.rows["ppo"]}
    rows_b = {"sft": b.rows["sft"], "ppo": b.rows["ppo"], "dpo": "f" * 64}
    found = compare(a, Side("b", rows_b, manifests))
    assert {row.row: row.status for row in found.rows} == {
        "sft": "differs", "reward": "only a", "ppo": "unsealed", "dpo": "only b",
    }  # fmt: skip
    assert found.starts == ["sft", "reward", "dpo"] and not found.identical


def test_figures_and_times(world: World) -> None:
    """0.5 -> 0.6 is +0.1, 20 % of 0.5; no relative difference from 0; times are never a difference."""
    one = {"loss": 0.5, "zero": 0, "nan": None, "time/wait": 1.0, "read": {"bad": 3}, "kept": 1.0, "gone": 1}
    two = {"loss": 0.6, "zero": 2, "nan": None, "time/wait": 9.0, "read": {"bad": 3}, "kept": 1, "new": "x"}
    a, b = world.chain("a", metrics=one), world.chain("b", seed=1, metrics=two)
    figures = {f.name: f for f in told(compare(a, b), "ppo").figures}
    assert list(figures) == ["loss", "zero", "gone", "new"]
    assert figures["loss"].difference == pytest.approx(0.1) and figures["loss"].relative == pytest.approx(0.2)
    assert (figures["zero"].difference, figures["zero"].relative) == (2.0, None)
    assert figures["gone"].document() == {
        "name": "gone", "a": 1, "difference": None, "relative": None, "overlap": None,
    }  # fmt: skip
    row = told(compare(a, b, everything=True), "ppo")
    assert [(f.name, f.a, f.b) for f in row.times] == [("seconds", 2.5, 2.5), ("time/wait", 1.0, 9.0)]
    assert [f.name for f in row.figures if f.same] == ["nan", "read.bad", "kept"]


def test_everything_shows_what_is_equal_without_calling_it_a_difference(world: World) -> None:
    found = compare(world.chain("a"), world.chain("b"), everything=True)
    row = told(found, "sft")
    assert found.identical and found.starts == [] and row.status == "identical"
    assert [c.document()["same"] for c in row.own] == [True, True] and row.environment[0].same
    row = told(compare(world.chain("a"), world.chain("b", rate=0.002), everything=True), "sft")
    assert [(c.name, c.same) for c in row.own] == [("train.learning_rate", False), ("train.betas", True)]


@pytest.mark.parametrize(("a", "b", "relative"), [(-0.5, -0.25, 0.5), (-0.5, -1.0, -1.0), (4, 1, -0.75)])
def test_relative_differences_keep_the_sign_of_the_difference(a: float, b: float, relative: float) -> None:
    """Over |a|: a loss that rises from -0.5 to -0.25 rose by half."""
    assert Figure("x", a, b).relative == relative


def test_intervals() -> None:
    """[0.5, 0.7] and [0.6, 0.8] share [0.6, 0.7]; touching counts; [0.71, 0.8] is apart."""
    between = lambda mean, low, high: {"mean": mean, "low": low, "high": high, "vs": "sft"}
    first = between(0.6, 0.5, 0.7)
    assert Figure("x", first, between(0.7, 0.6, 0.8)).overlap is True
    touching = between(0.75, 0.7, 0.8)
    assert Figure("x", first, touching).overlap is True and Figure("x", touching, first).overlap is True
    assert Figure("x", first, between(0.75, 0.71, 0.8)).overlap is Figure("x", between(0.75, 0.71, 0.8), first).overlap
    assert Figure("x", first, between(0.75, 0.71, 0.8)).overlap is False
    assert Figure("x", first, 0.9).overlap is None and Figure("x", first, 0.9).difference == pytest.approx(0.3)
    assert Figure("x", NAN, 0.9).difference is None


SAME = [(0.0, -0.0), (NAN, NAN), (1, 1.0), ([1, NAN], [1.0, NAN]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (None, None)]
OTHER = [(True, 1), (False, 0), (None, UNSET), (None, 0), ([1, 2], [2, 1]), ([1], [1, 1]), ({"a": 1}, {"a": 1, "b": 2}),
         (NAN, 1.0), ("1", 1), (math.inf, -math.inf), ([], {}), ("", None)]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_equal_values(a: Any, b: Any) -> None:
    assert same(a, b) and same(b, a)


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_other_values(a: Any, b: Any) -> None:
    assert not same(a, b) and not same(b, a)


def test_names_of_leaves_and_times() -> None:
    assert dict(flat({"a": {}, "b": [], "c": [[1]], "d": {"e": {"f": None}}})) == {
        "a": {}, "b": [], "c": [[1]], "d.e.f": None,
    }  # fmt: skip
    assert is_time("time/wait") and is_time("dev.time/wait") and is_time("read.seconds")
    assert not is_time("timeouts") and not is_time("seconds_of_audio")


def evaluation(gold: float, half: float = 0.1) -> dict[str, Any]:
    wins = {"vs": "sft", "mean": gold, "low": gold - half, "high": gold + half}
    return {"policies": {"sft": {"gold": 0.5, "win_rate": None}, "dpo": {"gold": gold, "win_rate": wins, "kl": 2.0}}}


def test_policies_are_a_grid(world: World) -> None:
    """dpo's gold 0.6 -> 0.7; wins [0.5, 0.7] and [0.6, 0.8] overlap; sft and the KL of dpo do not differ."""
    a, b = world.chain("a", metrics=evaluation(0.6)), world.chain("b", seed=1, metrics=evaluation(0.7))
    grid = policies_grid(told(compare(a, b), "ppo"))
    assert grid is not None and grid.head == ["policy", "wins", "gold"]
    assert grid.rows == [["dpo", "0.600 → 0.700 (+0.100) ~", "0.600 → 0.700 (+0.100)"]]
    assert grid.note == "~ the intervals overlap"
    near = world.chain("c", seed=2, metrics=evaluation(0.6001, 1e-6))
    grid = policies_grid(told(compare(a, near), "ppo"))
    assert grid is not None and grid.rows[0][2] == "0.600 → 0.600 (+1e-04)"
    assert policies_grid(told(compare(a, copy.deepcopy(a)), "ppo")) is None
