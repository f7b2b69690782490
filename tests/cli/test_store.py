"""`rlhf gc` and `rlhf verify`."""

from __future__ import annotations

import json
from pathlib import Path
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


def test_verify_of_a_run_names_every_artifact_down_to_the_raw_data(cli: Any) -> None:
    cli.json("run", "toy.yaml")
    told = cli.json("verify", "toy")
    assert told["damaged"] == 0 and all(found["intact"] for found in told["artifacts"])
    names = [found["artifact"] for found in told["artifacts"]]
    assert len(names) == len(set(names)) >= 3
    raw = [found for found in told["artifacts"] if found["kind"] == "raw data"]
    assert names[-2:] == [found["artifact"] for found in raw]  # both files that the plan names
    out = cli("verify", "toy")[1]
    assert f"{len(names)} of {len(names)} artifacts of toy are intact" in out and all(
        name.split("/")[-1] in out for name in names
    )


def test_verify_of_a_run_names_what_is_damaged(cli: Any) -> None:
    cli.json("run", "toy.yaml")
    artifacts = cli.json("verify", "toy")["artifacts"]
    source = next(Path(f["artifact"]) for f in artifacts if f["kind"] == "raw data")
    before = source.read_bytes()
    source.write_bytes(before + b" ")
    code, out, err = cli("verify", "toy")
    assert code == 3 and "DAMAGED" in out and f"{source}: changed since rows were computed from it" in err
    source.unlink()
    code, _, err = cli("verify", "toy")
    assert code == 3 and f"there is no file {source}" in err
    source.write_bytes(before)
    assert cli("verify", "toy")[0] == 0
    row, slot = next(f["artifact"] for f in artifacts if f["kind"] != "raw data").split(".")
    fingerprint = json.loads((cli.root / "runs" / "toy" / "rows.json").read_text())[row]
    stored = next(p for p in (cli.root / "store" / "rows" / fingerprint / slot).iterdir())
    data = bytearray(stored.read_bytes())
    data[0] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(bytes(data))
    code, out, err = cli("verify", "toy")
    assert code == 3 and "DAMAGED" in out and str(stored.name) in err and "its manifest says" in err
    assert cli("verify", "nosuch")[0] == 2
