"""`rlhf plan`: rows, types, fingerprints, fresh or stale and why."""

from __future__ import annotations

from typing import Any


def test_plan_json(cli: Any, golden: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    golden("plan", cli.json("plan", "toy.yaml"), cli.root)


def test_why_a_row_is_stale(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    _, out, _ = cli("plan", "toy.yaml", "--set", "first.word=other")
    lines = [line for line in out.splitlines() if not line.startswith("  ")]
    assert lines[2].startswith("first") and lines[2].endswith("settings.word word -> other")
    assert lines[3].split()[:2] == ["pair", "pending"] and lines[3].endswith("waits for first")
    assert "  documents: a list of Documents" in out and "<- first.documents, pair.documents" in out


def test_another_launch_reuses_a_sealed_row_and_says_so(cli: Any) -> None:
    cli.json("run", "toy.yaml", "--until", "first")
    _, out, _ = cli("plan", "toy.yaml", "--set", "launch.processes=2", "--set", "launch.strategy=ddp")
    assert out.splitlines()[2].endswith("sealed with 1 process, reused: launch settings are no part of its identity")


def test_planning_writes_no_row(cli: Any) -> None:
    cli.json("plan", "toy.yaml")
    assert not (cli.root / "store" / "rows").exists() and not (cli.root / "runs").exists()
