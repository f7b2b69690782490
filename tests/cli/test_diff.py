"""`rlhf diff`: two runs on disk, for people and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.fixture
def two(cli: Any) -> Any:
    """`a` and `b` differ in the word of row `first`, which `pair` and `last` read on."""
    cli.json("run", "toy.yaml", "--name", "a")
    cli.json("run", "toy.yaml", "--name", "b", "--set", "first.word=other")
    return cli


def table(out: str) -> list[list[str]]:
    """Lines of the first table, cut at two spaces or more."""
    return [[cell for cell in line.split("  ") if cell.strip()] for line in out.split("\n\n")[0].splitlines()]


def test_diff_json(two: Any, golden: Any) -> None:
    golden("diff", two.json("diff", "a", "b"), two.root)


def test_diff_for_people(two: Any) -> None:
    code, out, _ = two("diff", "a", "b")
    cells = [[cell.strip() for cell in line] for line in table(out)]
    assert code == 0
    assert cells[0] == ["row", "what differs", "a", "b"]
    assert cells[2:] == [
        ["first", "settings.word", "word", "other"],
        ["pair", "input documents: since first"],
        ["last", "input documents: since first"],
    ]
    assert "first  bytes   10  11          +1   +10.0 %" in out


def test_identical_runs_are_one_line(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--name", "a")
    cli.json("run", "toy.yaml", "--name", "b")
    assert cli("diff", "a", "b") == (0, "a and b are identical: the same 3 rows\n", "")
    assert cli("diff", "runs/a", "a", "--row", "pair") == (0, "a and a are identical: pair\n", "")
    document = cli.json("diff", "a", "b")
    assert document["identical"] is True and document["starts"] == []


def test_seeds_stand_once_beside_the_rows(cli: Any) -> None:
    """Another seed makes every row another one: said once; a row with nothing else to say points there."""
    cli.json("run", "toy.yaml", "--name", "a")
    cli.json("run", "toy.yaml", "--name", "b", "--set", "seed=5", "--set", "last.word=end")
    _, out, _ = cli("diff", "a", "b")
    assert [line.split() for line in out.splitlines() if line.startswith("seed")] == [
        ["seed", "0", "5", "all", "3", "rows", "that", "differ"]
    ]
    assert "first  seed, see below" in out and "last   settings.word" in out
    assert cli.json("diff", "a", "b")["starts"] == ["first", "pair", "last"]


def test_one_row_and_everything(two: Any) -> None:
    _, out, _ = two("diff", "a", "b", "--row", "first", "--all")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "first settings.word word other" in lines and "settings.seconds (same) 0.0 0.0" in lines
    assert "loss 0.25 0.25 0 +0.0 % same" in lines and any(line.startswith("seconds ") for line in lines)
    assert not any(line.startswith("pair") for line in lines)
    _, out, _ = two("diff", "a", "b")
    assert "seconds" not in out and "(same)" not in out
    assert [row["row"] for row in two.json("diff", "a", "b", "--row", "pair")["rows"]] == ["pair"]


def test_rows_that_one_run_lacks(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--name", "a")
    cli.json("run", "toy.yaml", "--name", "b", "--set", "pair.word=x", "--until", "first")
    _, out, _ = cli("diff", "a", "b")
    assert [line[1].strip() for line in table(out)[2:]] == ["identical", "in one run alone", "in one run alone"]


def test_unknown_runs_and_rows_name_those_that_exist(two: Any) -> None:
    code, out, err = two("diff", "a", "c")
    assert (code, out) == (2, "") and "there are: a, b" in err
    code, out, err = two("diff", "a", "b", "--row", "frist")
    assert (code, out) == (2, "") and "no row is called frist; they have first, pair, last" in err


def test_a_row_that_never_sealed(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--name", "a")
    assert cli("run", "toy.yaml", "--name", "b", "--set", "pair.fail=crash")[0] == 1
    code, out, _ = cli("diff", "a", "b")
    assert code == 0 and "pair   not sealed in both" in out and "b ended with exit code 1: " in out
    code, out, err = cli("diff", "a", "b", "--row", "pair")
    assert (code, out) == (2, "") and "row pair of b is not sealed" in err and "logs/pair.log" in err


def test_a_run_that_goes_on_and_one_that_has_not_begun(two: Any) -> None:
    path = two.root / "runs" / "b" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "exit_code": None, "finished": None}))
    code, out, _ = two("diff", "a", "b")
    assert code == 0 and "b: still running, or ended by force: the rows above are sealed" in out
    path.unlink()
    code, out, err = two("diff", "a", "b")
    assert (code, out) == (2, "") and "b: nothing is recorded yet" in err


@pytest.mark.parametrize("name", ["summary.json", "rows.json"])
def test_damaged_files_of_a_run_are_named(two: Any, name: str) -> None:
    (two.root / "runs" / "b" / name).write_text("[1]")
    code, out, err = two("diff", "a", "b")
    assert (code, out) == (3, "") and f"b/{name}: " in err and "; remove it and run the plan again" in err


def test_a_damaged_manifest_is_named(two: Any) -> None:
    fingerprint = json.loads((two.root / "runs" / "b" / "rows.json").read_text())["pair"]
    path = two.root / "store" / "rows" / fingerprint / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"loss": 0.25', '"loss": 0.26'))
    code, out, err = two("diff", "a", "b")
    assert (code, out) == (3, "") and str(path) in err and "was changed" in err
