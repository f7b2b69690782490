"""`rlhf show` and `rlhf lineage`."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest


def test_show_and_lineage_json(cli: Any, golden: Any) -> None:
    cli.json("run", "toy.yaml")
    golden("show_run", cli.json("show", "toy"), cli.root)
    golden("show_row", cli.json("show", "toy", "pair"), cli.root)
    golden("lineage", cli.json("lineage", "toy", "last"), cli.root)


def test_show_and_lineage_for_people(cli: Any) -> None:
    cli.json("run", "toy.yaml")
    _, out, _ = cli("show", "toy")
    assert out.splitlines()[2].startswith("first  executed") and out.splitlines()[2].endswith("bytes 10")
    _, out, _ = cli("show", "runs/toy", "pair")
    assert "  word: word" in out.splitlines() and "  loss: 0.25" in out.splitlines()
    assert re.search(r"^started: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", out, re.MULTILINE)
    _, out, _ = cli("lineage", "toy", "last")
    shapes = [line.rsplit("  ", 1)[0] if "shown" not in line else line for line in out.splitlines()]
    assert shapes[0].startswith("last")
    assert shapes[1] == "  documents = documents of first"
    assert shapes[2] == f"    documents = {cli.root}/text.txt"
    assert shapes[3] == "  documents = documents of pair"
    assert shapes[4] == f"    comparisons = {cli.root}/pairs.jsonl"
    assert shapes[5].startswith("    documents = documents of first") and shapes[5].endswith("(shown above)")


def test_unknown_runs_and_rows_name_those_that_exist(cli: Any) -> None:
    code, _, err = cli("show", "toy")
    assert code == 2 and "there are: none" in err
    cli.json("run", "toy.yaml", "--until", "first")
    assert "there are: toy" in cli("show", "tyo")[2]
    code, _, err = cli("lineage", "toy", "pair")
    assert code == 2 and "it has first" in err


def test_a_row_that_never_sealed_points_to_its_log(cli: Any) -> None:
    assert cli("run", "toy.yaml", "--set", "first.fail=crash")[0] == 1
    code, _, err = cli("show", "toy", "first")
    assert code == 2 and "is not sealed" in err and "logs/first.log" in err
    _, out, _ = cli("show", "toy")
    assert "ended with exit code 1" in out


@pytest.mark.parametrize("text", ["null", "[1]", '{"rows": 5}', '{"run": 1, "rows": [{}], "exit_code": 0, "error": 0}'])
def test_damaged_files_of_a_run_are_named(cli: Any, text: str) -> None:
    folder = cli.root / "runs" / "toy"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text("{}")
    (folder / "summary.json").write_text(text)
    code, out, err = cli("show", "toy")
    assert (code, out) == (3, "") and "toy/summary.json: " in err and "; remove it and run the plan again" in err
    (folder / "rows.json").write_text(text)
    for command in ("show", "lineage"):
        code, out, err = cli(command, "toy", "first")
        assert (code, out) == (3, "") and "toy/rows.json: " in err and "; remove it and run the plan again" in err


SUMMARY = {"run": "toy", "exit_code": 0, "error": None, "rows": []}
ROW = {
    "row": "first", "stage": "first", "status": "executed", "seconds": 1.0, "metrics": {}, "fingerprint": "aa",
    "headline": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("rows.json", {row: fingerprint})
            for row, fingerprint in [
                ("../../../etc/x", "aa"), ("/etc/x", "aa"), ("a\0b", "aa"), ("", "aa"), ("First", "aa"),
                ("first", "../../../x"), ("first", "/etc"), ("first", "a\0b"), ("first", ""), ("first", 5),
            ]
        ),
        *(
            ("summary.json", {**SUMMARY, "rows": [{**ROW, key: value}]})
            for key, value in [
                ("seconds", "1"), ("metrics", []), ("fingerprint", None), ("headline", "loss"), ("headline", [1]),
                ("row", 5), ("status", {}),
            ]
        ),
    ],
)  # fmt: skip
def test_what_stands_in_files_of_a_run_leads_nowhere_else(cli: Any, name: str, content: Any) -> None:
    folder = cli.root / "runs" / "toy"
    folder.mkdir(parents=True)
    for file, text in {"rows.json": {"first": "aa"}, "summary.json": SUMMARY, "plan.json": {}, name: content}.items():
        (folder / file).write_text(json.dumps(text))
    (cli.root / "store" / "rows").mkdir(parents=True)
    commands = {
        "rows.json": [("show", "toy", "first"), ("lineage", "toy", "first"), ("verify", "toy"), ("gc", "--keep", "toy"),
                      ("diff", "toy", "toy"), ("report", "--curve", "toy")],
        "summary.json": [("show", "toy"), ("report", "toy"), ("diff", "toy", "toy"), ("report", "--curve", "toy")],
    }  # fmt: skip
    for command in commands[name]:
        code, out, err = cli(*command)
        assert (code, out) == (3, "") and f"toy/{name}: " in err and "remove it and run the plan again" in err, command


@pytest.mark.parametrize("name", ["rows.json", "summary.json", "plan.json", "metrics/ppo.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_among_files_of_a_run_are_not_read(cli: Any, name: str, kind: str) -> None:
    folder = cli.root / "runs" / "toy"
    (folder / "metrics").mkdir(parents=True)
    for file, text in {"rows.json": {"ppo": "aa"}, "summary.json": SUMMARY, "plan.json": {}}.items():
        (folder / file).write_text(json.dumps(text))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    commands = (
        "show toy|show toy ppo|verify toy|gc|report toy|diff toy toy|report --curve toy|run toy.yaml --until first"
    )
    for command in commands.split("|"):
        code, _, err = cli(*command.split())
        assert "Traceback" not in err, command
        if code:
            assert code in (2, 3) and err.startswith("rlhf: ")


def test_names_of_runs_that_cannot_be(cli: Any) -> None:
    for name in ("a\0b", "x" * 5000, "/dev/zero", "..", ""):
        code, out, err = cli("show", name)
        assert (code, out) == (2, "") and err.startswith("rlhf: "), name
