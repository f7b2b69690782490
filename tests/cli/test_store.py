"""`rlhf gc` and `rlhf verify`."""

from __future__ import annotations

from typing import Any


def test_gc_removes_what_no_run_reaches(cli: Any, golden: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    assert cli.json("gc") == {"dry_run": False, "bytes": 0, "removed": []}
    cli.json("run", "toy.yaml", "--until", "first", "--set", "first.word=other")
    would = cli.json("gc", "--dry-run")
    assert len(list((cli.root / "store" / "rows").iterdir())) == 2
    done = cli.json("gc")
    assert would["removed"] == done["removed"] and len(done["removed"]) == 1
    assert len(list((cli.root / "store" / "rows").iterdir())) == 1
    for item in done["removed"]:
        assert item["bytes"] == done["bytes"] > 0
        item["bytes"] = done["bytes"] = 0
    golden("gc", done, cli.root)


def test_gc_keeps_named_runs_alone(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first", "--name", "one")
    cli.json("run", "toy.yaml", "--until", "first", "--name", "two", "--set", "first.word=other")
    assert cli.json("gc")["removed"] == []
    assert len(cli.json("gc", "--keep", "two", "--dry-run")["removed"]) == 1
    code, out, _ = cli("gc", "--keep", "one")
    assert code == 0 and "freed" in out and "sealed row first" in out
    assert cli("gc", "--keep", "three")[0] == 2


def test_verify_json(cli: Any, golden: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    golden("verify", cli.json("verify"), cli.root)
    assert "1 of 1 sealed rows are intact" in cli("verify")[1]


def test_a_store_that_is_not_there_is_not_intact(cli: Any) -> None:
    code, out, err = cli("verify", "--store", "nowhere")
    assert (code, out) == (2, "") and "nowhere: there is no store here" in err
