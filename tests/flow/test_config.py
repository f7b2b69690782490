"""Settings and YAML: what is refused, where, and what decides identity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from pipeline.flow.config import (
    Places,
    Settings,
    absolute_path_value,
    added,
    assign,
    load_document,
    merge,
    not_identity,
    parse_set,
    parse_settings,
    read_yaml,
    with_sets,
)
from pipeline.flow.errors import UserError


class Sigmoid(Settings):
    kind: Literal["sigmoid"] = "sigmoid"
    beta: float = 0.1


class Ipo(Settings):
    kind: Literal["ipo"] = "ipo"
    tau: float = 0.2


class Train(Settings):
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    token_budget: int = not_identity(4096, "tokens a micro-batch", gt=0)


class Config(Settings):
    train: Train = Train()
    loss: Sigmoid | Ipo = pydantic.Field(default=Sigmoid(), discriminator="kind")
    steps: int = 10
    log_every: int = not_identity(5, "steps between two lines")


# ------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1", 1),
        ("010", 10),
        (".5", 0.5),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2020-01-01", "2020-01-01"),
        ("1:30", "1:30"),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("[a, 1]", ["a", 1]),
        ("{a: {b: null}}", {"a": {"b": None}}),
    ],
)
def test_scalars_without_surprises(text: str, value: object) -> None:
    found, _ = read_yaml(text, "x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: the key 'a' stands twice (first in line 1)"),
        ("top:\n  a: 1\n  a: 2", "x.yaml:3: the key 'a' stands twice (first in line 2)"),
        ("a: &x 1\nb: *x", "x.yaml:1: anchors"),
        ("a: !!python/object:os.system {}", "x.yaml:1: the tag"),
        ("a: !!timestamp 2020-01-01", "x.yaml:1: the tag"),
        ("a: [1", "x.yaml:1:"),
        ("a: \x00", "x.yaml: is not YAML"),
        ("[" * 5000, "x.yaml:1: nested too deeply, more than 64 levels"),
        ("? [a]\n: 1", "x.yaml:1: a key must be plain text"),
        ("a: 1\nb:\n" + "".join(" " * i + "- \n" for i in range(1, 100)), "nested too deeply, more than 64 levels"),
        ("{a: " * 70, "nested too deeply"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "x.yaml:1: anchors"),
        ("a: 1\nb: " + "9" * 401, "x.yaml:2: a number of 401 digits is not read"),
        ("a: 0x" + "f" * 4000, "x.yaml:1: a number of 4002 digits is not read"),
    ],
)
def test_refused_yaml_names_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_yaml(text, "x.yaml")
    assert message in str(error.value)
    assert error.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------- extends


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.yaml").write_text(
        "stages: {sft: {x: 1, l: [1, 2]}}\nsources: {d: {path: own.jsonl}, w: {kind: world, seed: 3}}\n"
    )
    (tmp_path / "parts/b.yaml").write_text("extends: [a.yaml]\nstages: {sft: {y: 2}}\n")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "extends: [parts/b.yaml]\nstages: {sft: {x: 5, l: [3]}}\nsources: {e: {path: [../f, /g]}, w: {kind: prompts}}\n"
    )
    document = load_document(plan)
    assert document.values["stages"] == {"sft": {"x": 5, "y": 2, "l": [3]}}
    assert document.values["sources"]["d"]["path"] == str(tmp_path / "parts/own.jsonl")
    assert document.values["sources"]["e"]["path"] == [str(tmp_path.parent / "f"), "/g"]
    assert document.values["sources"]["w"] == {"kind": "prompts"}  # another kind: nothing of the old one is left
    assert document.places.of("stages.sft", ["x"]) == f"{plan}:2: "
    assert document.places.of("stages.sft", ["y"]) == f"{tmp_path / 'parts/b.yaml'}:2: "
    assert document.places.of("stages.sft", ["l", "1"]) == f"{plan}:2: "  # of the list that replaced a longer one
    assert document.places.of("sources", ["w", "seed"]) == f"{plan}:3: "


def test_extends_refuses_cycles_missing_files_and_text(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for text, message in (
        ("seed: 1\nextends: [plan.yaml]", "extends itself"),
        ("seed: 1\nextends: [gone.yaml]", f"{plan}:2: extends 'gone.yaml'"),
        ("extends: base.yaml", "is a list of files"),
        ("- a", "expected a mapping"),
    ):
        plan.write_text(text)
        with pytest.raises(UserError, match="plan.yaml") as error:
            load_document(plan)
        assert message in str(error.value)
    with pytest.raises(UserError, match="there is no such file"):
        load_document(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "has more than 1048576 bytes"),
        (lambda path: path.write_text("#" * (2**20 + 1)), "has more than 1048576 bytes"),
        (lambda path: path.write_bytes(b"\xff"), "cannot be read as UTF-8 text"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "there is no such file"),
    ],
)
def test_plans_are_bounded(tmp_path: Path, make: Any, told: str) -> None:
    make(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="x.yaml: ") as error:
        load_document(tmp_path / "x.yaml")
    assert told in str(error.value)
    for part in ("pipe", "a\\0b", "/dev/zero"):
        (tmp_path / "y.yaml").write_text(f'extends: ["{part}"]\n')
        (tmp_path / "pipe").exists() or os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match=r"y.yaml:1: extends .* but there is no file"):
            load_document(tmp_path / "y.yaml")


def test_sets_are_assigned_to_a_document_that_stays_as_it_is(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("stages: {dpo: {beta: 0.1}}")
    document = load_document(plan)
    changed = with_sets(document, ["stages.dpo.beta=0.2", "sources.x.path=a.jsonl", "seed=3"])
    assert document.values == {"stages": {"dpo": {"beta": 0.1}}}
    assert changed.places.of("stages", ["dpo", "beta"]) == "--set stages.dpo.beta=0.2: "
    assert changed.places.of("sources", ["x"]) == "--set sources.x.path=a.jsonl: "  # what a set makes on its way
    assert changed.places.of("stages", ["dpo", "loss"]) == f"{plan}:1: "
    whole = with_sets(document, ["stages.dpo={beta: 0}"])
    assert whole.places.of("stages", ["dpo", "beta"]) == "--set stages.dpo={beta: 0}: "
    assert changed.values == {
        "stages": {"dpo": {"beta": 0.2}},
        "sources": {"x": {"path": str(Path.cwd() / "a.jsonl")}},
        "seed": 3,
    }


def test_a_home_that_is_nobodys_stays_a_path(tmp_path: Path) -> None:
    assert absolute_path_value("path", "~nobody-of-that-name/x", tmp_path) == str(tmp_path / "~nobody-of-that-name/x")
    assert absolute_path_value("path", "~/x", tmp_path) == str(Path.home() / "x")


def test_parse_set() -> None:
    assert parse_set("dpo.beta=0.2") == (("dpo", "beta"), 0.2)
    assert parse_set("sft@2.train={epochs: 1}") == (("sft@2", "train"), {"epochs": 1})
    assert parse_set("a.b=x=y") == (("a", "b"), "x=y")
    for bad in ("dpo.beta", "=1", "a..b=1"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_set(bad)


def test_assign_makes_mappings_and_refuses_to_go_below_a_value() -> None:
    document: dict = {"a": None, "n": 3}
    assign(document, ("a", "b"), 1, "--set a.b=1")
    assert document == {"a": {"b": 1}, "n": 3}
    with pytest.raises(UserError, match="--set n.b=1: 'n' holds 3"):
        assign(document, ("n", "b"), 1, "--set n.b=1")


def test_another_name_is_another_thing_but_not_another_plan(tmp_path: Path) -> None:
    below = {"loss": {"name": "simpo", "gamma": 1.0, "beta": 2.0}}
    assert merge(below, {"loss": {"name": "ipo", "beta": 0.5}}) == {"loss": {"name": "ipo", "beta": 0.5}}
    assert merge(below, {"loss": {"name": "simpo", "beta": 0.5}})["loss"]["gamma"] == 1.0
    (tmp_path / "below.yaml").write_text("name: below\nstages: {sft: {x: 1}}\n")
    (tmp_path / "plan.yaml").write_text("extends: [below.yaml]\nname: plan\n")
    assert load_document(tmp_path / "plan.yaml").values == {"name": "plan", "stages": {"sft": {"x": 1}}}


def test_merge_leaves_its_arguments_alone() -> None:
    below = {"a": {"b": 1}}
    assert merge(below, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert below == {"a": {"b": 1}}


# --------------------------------------------------------------------------------------------------- settings


def test_unknown_keys_name_place_and_nearest_key() -> None:
    places = Places({("settings", "dpo", "loss", "betta"): "p.yaml:7", ("settings", "dpo"): "p.yaml:5"})
    values = {"loss": {"kind": "sigmoid", "betta": 1}, "stesp": 3}
    with pytest.raises(UserError) as error:
        parse_settings(Config, values, "settings.dpo", places)
    assert str(error.value) == "p.yaml:5: settings.dpo: unknown key 'stesp'; did you mean 'steps'?"
    with pytest.raises(UserError) as error:
        parse_settings(Config, {"loss": values["loss"]}, "settings.dpo", places)
    assert str(error.value) == "p.yaml:7: settings.dpo.loss: unknown key 'betta'; did you mean 'beta'?"


def test_every_problem_at_once_with_the_value_given() -> None:
    with pytest.raises(UserError) as error:
        parse_settings(Config, {"steps": "many", "train": {"learning_rate": -1}}, "settings.sft")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("settings.sft.train.learning_rate: ") and "given: -1" in lines[0]
    assert lines[1].startswith("settings.sft.steps: ") and "given: 'many'" in lines[1]


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="finite"):
        parse_settings(Config, {"train": {"learning_rate": float("inf")}}, "settings.sft")


def test_a_boolean_is_no_number() -> None:
    class More(Train):
        either: bool | int = 1
        level: Literal[1, 2] = 1
        maybe: int | None = None
        anything: dict[str, Any] = {}
        text: str | None = None

    values = {"learning_rate": True, "betas": [0.5, False], "token_budget": True, "level": True, "maybe": False}
    with pytest.raises(UserError) as error:
        parse_settings(More, values, "settings.x")
    assert str(error.value).splitlines() == [
        "settings.x.learning_rate: Input should be a valid number (given: True)",
        "settings.x.betas.1: Input should be a valid number (given: False)",
        "settings.x.token_budget: Input should be a valid integer (given: True)",
        "settings.x.level: expected 1 or 2, found True",
        "settings.x.maybe: Input should be a valid integer (given: False)",
    ]
    found = parse_settings(More, {"either": True, "anything": {"a": True}, "betas": [0, 1]}, "settings.x")
    assert found.either is True and found.anything == {"a": True} and found.betas == (0.0, 1.0)


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Config().steps = 3  # type: ignore[misc]


def test_identity_leaves_out_what_does_not_decide_the_result() -> None:
    assert Config().identity() == {
        "train": {"learning_rate": 1e-3, "betas": [0.9, 0.95]},
        "loss": {"kind": "sigmoid", "beta": 0.1},
        "steps": 10,
    }
    assert Config(log_every=1, train=Train(token_budget=1)).identity() == Config().identity()


def test_a_field_added_later_is_part_of_identity_where_it_is_not_at_its_default() -> None:
    class Older(Settings):
        steps: int = 10

    class Newer(Older):
        loss: Sigmoid = added(Sigmoid(kind="sigmoid"), "what is minimised")
        passes: int = added(1, "how often", ge=1)

    assert Newer().identity() == Newer(loss=Sigmoid()).identity() == Older().identity()
    assert Newer(passes=2).identity() == {"steps": 10, "passes": 2}
    assert Newer(loss=Sigmoid(beta=0.2)).identity() == {"steps": 10, "loss": {"kind": "sigmoid", "beta": 0.2}}


def test_identity_reaches_into_lists_and_mappings() -> None:
    class Many(Settings):
        several: list[Train] = []
        named: dict[str, Train] = {}

    found = Many(several=[Train()], named={"a": Train()}).identity()
    assert "token_budget" not in found["several"][0]
    assert "token_budget" not in found["named"]["a"]


def test_a_nested_mapping_changes_the_keys_it_names_of_the_default_of_its_field() -> None:
    class Stage(Settings):
        train: Train = Train(learning_rate=5.0, betas=(0.5, 0.6))
        loss: Sigmoid | Ipo = pydantic.Field(default=Sigmoid(beta=0.7), discriminator="kind")

    found = parse_settings(Stage, {"train": {"betas": [0.1, 0.2]}}, "settings.x")
    assert (found.train.learning_rate, found.train.betas) == (5.0, (0.1, 0.2))
    assert parse_settings(Stage, {"loss": {"kind": "sigmoid"}}, "settings.x").loss == Sigmoid(beta=0.7)
    assert parse_settings(Stage, {"loss": {"kind": "ipo"}}, "settings.x").loss == Ipo()


def test_a_choice_among_words_is_no_other_member_of_a_union() -> None:
    class Choosing(Settings):
        precision: Literal["fp32", "bf16"] = "fp32"
        every: int = 100

    class Stage(Settings):
        train: Choosing = Choosing(every=1)

    assert parse_settings(Stage, {"train": {"precision": "bf16"}}, "settings.x").train.every == 1


@pytest.mark.parametrize("bad", [0, 1, 1.0, "yes", "off", "true", [True]])
def test_a_number_or_a_word_is_no_boolean(bad: object) -> None:
    class Switches(Settings):
        plain: bool = False
        maybe: bool | None = None
        early: bool | Literal["never"] = False

    for key in ("plain", "maybe", "early"):
        with pytest.raises(UserError, match=f"settings.x.{key}"):
            parse_settings(Switches, {key: bad}, "settings.x")
    assert parse_settings(Switches, {"plain": True, "maybe": None, "early": "never"}, "settings.x").early == "never"
