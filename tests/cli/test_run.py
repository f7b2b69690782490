"""`rlhf run` and `rlhf stage`: tables for people, golden JSON for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.run import headline, look_up
from pipeline.flow import config
from pipeline.flow.runner import RowResult


def test_run_json(cli: Any, golden: Any) -> None:
    golden("run", cli.json("run", "toy.yaml"), cli.root)
    assert {row["status"] for row in cli.json("run", "toy.yaml")["rows"]} == {"reused"}


def test_a_run_ends_with_a_table_and_where_things_are(cli: Any) -> None:
    code, out, err = cli("run", "toy.yaml", "--until", "pair", "--name", "mine")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["row", "seconds", "tokens", "figures"]
    name, status, seconds, *rest = lines[2].split()
    assert (name, status, rest) == ("first", "executed", ["3", "bytes", "10"]) and float(seconds) > 0
    assert "runs/mine" in lines[-1]
    assert "first: started (never run)" in err and "first: toy said something" in err
    assert "reused" in cli("run", "toy.yaml", "--until", "pair", "--name", "mine")[1]


def test_a_plan_file_is_read_once(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, text_of = [], config._text
    monkeypatch.setattr(config, "_text", lambda path: read.append(path) or text_of(path))
    cli.json("run", "toy.yaml", "--until", "first")
    assert read == [Path("toy.yaml")]


def test_bad_files_are_told_before_any_row_runs(cli: Any) -> None:
    good = (cli.root / "pairs.jsonl").read_text()
    (cli.root / "pairs.jsonl").write_text(good + '{"prompt": "q"}\n')
    code, _, err = cli("run", "toy.yaml")
    assert code == 2 and "pairs.jsonl:2: " in err and "started" not in err
    code, _, err = cli("run", "toy.yaml", "--until", "first")
    assert code == 0, "its own file is good"
    code, _, err = cli("run", "toy.yaml", "--skip-bad")
    assert code == 0 and "first: reused" in err and "pair: started" in err


def test_settings_from_the_command_line(cli: Any) -> None:
    first = cli.json("run", "toy.yaml", "--until", "first")
    other = cli.json("run", "toy.yaml", "--until", "first", "--set", "first.word=longer")
    assert other["rows"][0]["status"] == "executed"
    assert other["rows"][0]["metrics"]["bytes"] == first["rows"][0]["metrics"]["bytes"] + 2


def test_one_row_alone(cli: Any) -> None:
    assert [row["row"] for row in cli.json("stage", "toy.yaml", "first")["rows"]] == ["first"]
    cli.json("run", "toy.yaml")
    cli.json("stage", "toy.yaml", "first")
    rows = cli.json("show", "toy")["rows"]
    assert [row["row"] for row in rows] == ["first", "pair", "last"], "the other rows are still known"


def test_a_row_alone_needs_what_it_reads(cli: Any) -> None:
    code, _, err = cli("stage", "toy.yaml", "last")
    assert code == 2 and "row first is not sealed" in err


def test_a_row_computed_again(cli: Any, golden: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    golden("stage_force", cli.json("stage", "toy.yaml", "first", "--force"), cli.root)
    code, out, _ = cli("stage", "toy.yaml", "first", "--force")
    assert code == 0 and "same" in out


def test_a_row_that_comes_out_otherwise_is_code_1(cli: Any) -> None:
    random = ("--set", "first.random=true")
    cli.json("run", "toy.yaml", "--until", "first", *random)
    code, out, _ = cli("stage", "toy.yaml", "first", "--force", *random)
    assert code == 1 and "DIFFERS" in out and "data.jsonl" in out and "again/first/out" in out


def test_headline_figures() -> None:
    row = RowResult("dpo", "dpo", "executed", metrics={"heldout": {"accuracy": 0.71234}, "loss": 0.5, "n": 12345})
    assert headline(row) == "loss 0.5  n 12,345"
    named = RowResult("dpo", "dpo", "executed", metrics=row.metrics, headline=("heldout.accuracy", "missing"))
    assert headline(named) == "heldout.accuracy 0.712"
    assert look_up({"a.b": 1}, "a.b") == 1
