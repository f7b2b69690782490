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
