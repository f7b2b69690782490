"""`rlhf report`: the figures of runs as they lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def between(value: float) -> dict[str, float]:
    return {"mean": value, "low": value - 0.05, "high": value + 0.05}


def write_run(root: Path, name: str, seed: int, ended: bool = True) -> None:
    """A run directory of one evaluation row in which DPO wins over SFT."""
    directory = root / "runs" / name
    directory.mkdir(parents=True)
    (directory / "rows.json").write_text(json.dumps({"evaluate": "0" * 64}))
    (directory / "plan.json").write_text(json.dumps({"seed": seed}))
    if not ended:
        return
    policies: dict[str, Any] = {
        "sft": {"gold": 0.5, "win_rate": None, "stop_rate": 0.995},
        "dpo": {"gold": 0.8, "win_rate": {"vs": "sft", **between(0.75)}, "stop_rate": 0.98},
    }
    metrics = {"temperature": 1.0, "policies": policies}
    row = {"row": "evaluate", "stage": "evaluate", "status": "executed", "metrics": metrics}
    row |= {"seconds": 1.0, "fingerprint": "0" * 64, "headline": []}
    summary = {"run": name, "rows": [row], "exit_code": 0, "error": None}
    (directory / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def two(cli: Any) -> Any:
    write_run(cli.root, "first", 0)
    write_run(cli.root, "second", 5)
    return cli


def test_report_json_reads_every_run_with_its_seed(two: Any) -> None:
    document = two.json("report", "first", "second")
    wins = [f for f in document["figures"] if f["gate"] == "dpo wins over sft"]
    assert [(f["run"], f["seed"], f["value"], f["status"]) for f in wins] == [
        ("first", 0, 0.75, "met"),
        ("second", 5, 0.75, "met"),
    ]
    assert wins[0] == {
        "run": "first",
        "seed": 0,
        "temperature": 1.0,
        "gate": "dpo wins over sft",
        "value": 0.75,
        "low": pytest.approx(0.7),
        "high": pytest.approx(0.8),
        "target": "≥ 0.65, interval above 0.5",
        "status": "met",
        "note": "",
    }
    assert set(document) == {"figures", "missed"}
    assert {f["status"] for f in document["figures"]} <= {"met", "missed", "not measured"}
    assert document["missed"] == sum(f["status"] == "missed" for f in document["figures"]) > 0


def test_report_for_people(two: Any) -> None:
    code, out, _ = two("report", "first", "--markdown")
    assert code == 0 and "| dpo wins over sft | ≥ 0.65, interval above 0.5 | 0.750 [0.700, 0.800] met |" in out
    assert "**seed 0, evaluate, temperature 1**" in out
    code, out, _ = two("report", "runs/second", "--markdown", "--brief")  # a run by its directory, gates alone
    assert code == 0 and "seed 5" in out and "evaluate, temperature" not in out
    code, out, _ = two("report", "first")
    assert code == 0 and "dpo wins over sft" in out


def test_runs_that_cannot_be_reported_are_named(two: Any) -> None:
    code, _, err = two("report", "third")
    assert code == 2 and "there are: first, second" in err
    write_run(two.root, "third", 1, ended=False)
    code, _, err = two("report", "first", "third")
    assert code == 2 and "third: this run has not ended yet" in err


@pytest.mark.parametrize("name", ["plan.json", "summary.json"])
def test_damaged_files_of_a_run_are_named(two: Any, name: str) -> None:
    (two.root / "runs" / "first" / name).write_text("null")
    code, out, err = two("report", "first")
    assert (code, out) == (3, "") and f"first/{name}: expected a JSON object, found NoneType; remove it" in err


def write_metrics(root: Path, name: str, row: str, lines: list[dict[str, Any]]) -> None:
    directory = root / "runs" / name
    rows = json.loads((directory / "rows.json").read_text())
    (directory / "rows.json").write_text(json.dumps({row: "1" * 64, **rows}))
    (directory / "metrics").mkdir(exist_ok=True)
    (directory / "metrics" / f"{row}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


DEV = [
    {"step": 2, "dev/kl": 1.0, "dev/proxy": 0.2, "dev/gold": 0.7},
    {"step": 4, "dev/kl": 4.0, "dev/proxy": 0.6, "dev/gold": 0.6},
]


def test_the_curve_as_json_table_and_picture(two: Any, golden: Any) -> None:
    write_metrics(two.root, "first", "ppo", DEV)
    write_metrics(two.root, "second", "dpo", [{"step": 1, "loss": 0.7}])
    golden("report_curve", two.json("report", "first", "second", "--curve"), two.root)
    code, out, _ = two("report", "first", "--curve", "--markdown", "--out", "curve.html")
    assert code == 0 and "| ppo | 2 | 1.000 | 0.200 | 0.700 | best gold |" in out and "picture  curve.html" in out
    assert "- ppo: proxy and gold part after step 2 (KL 1.00): until step 4 proxy +0.400, gold -0.100." in out
    assert "<svg" in (two.root / "curve.html").read_text()
    code, out, err = two("report", "first", "--curve", "--sqrt-kl", "--out", "curve.html", "--json")
    assert code == 0 and json.loads(out)["curves"][0]["row"] == "ppo" and "picture" in err
    assert "square-root scale" in (two.root / "curve.html").read_text()
    code, out, _ = two("report", "first", "--curve")
    assert code == 0 and "ppo: no dev/heldout." in out


def test_the_curve_of_a_run_that_goes_on(two: Any) -> None:
    write_run(two.root, "third", 0, ended=False)
    write_metrics(two.root, "third", "ppo", DEV)
    with open(two.root / "runs/third/metrics/ppo.jsonl", "a") as file:
        file.write('{"step": 6, "dev/')
    assert [p["step"] for p in two.json("report", "third", "--curve")["curves"][0]["points"]] == [2, 4]


def test_what_an_earlier_version_of_a_row_kept_is_not_this_ones(two: Any) -> None:
    """summary.json tells of a row until it is done again; rows.json names the version whose lines are there."""
    write_metrics(two.root, "first", "ppo", DEV)
    path = two.root / "runs/first/summary.json"
    summary = json.loads(path.read_text())
    row = {**summary["rows"][0], "row": "ppo", "stage": "ppo", "metrics": {"dev/kept_step": 4}}
    for fingerprint, kept in (("0" * 64, None), ("1" * 64, 4)):
        path.write_text(json.dumps({**summary, "rows": [{**row, "fingerprint": fingerprint}]}))
        assert two.json("report", "first", "--curve")["curves"][0]["kept"] == kept


def test_a_run_without_a_curve_says_what_is_missing(two: Any) -> None:
    code, out, err = two("report", "first", "--curve", "--out", "curve.html")
    assert (code, out) == (2, "") and "first: no row recorded a score with a KL beside it" in err
    write_metrics(two.root, "first", "dpo@sft", [{"step": 1, "loss": 0.7}])
    code, out, err = two("report", "first", "--curve", "--out", "curve.html")
    assert (code, out) == (2, "") and "dpo@sft: no dev scores (dev/proxy" in err
    assert not (two.root / "curve.html").exists()
    code, out, err = two("report", "first", "--out", "curve.html")
    assert (code, out) == (2, "") and "add --curve" in err
