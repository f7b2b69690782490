"""Canaries: whatever a user puts where, no file of a run and no message holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CANARY = "hf_" + "Canary0123456789"


def places_with(root: Path, text: str) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_environment_is_recorded_nowhere(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-another-kind")
    assert cli("run", "toy.yaml")[0] == 0
    code, out, err = cli("run", "toy.yaml", "--set", "first.fail=crash", "--name", "crashed")
    assert code == 1 and CANARY not in out + err
    assert not places_with(cli.root, CANARY) and not places_with(cli.root, "canary-of-another-kind")


@pytest.mark.parametrize(
    "setting",
    [
        f"first.word={CANARY}",
        f"first.hub_token={CANARY}",
        f"sources.text.path=https://me:{CANARY}@host/x",
        f"{CANARY}=1",
    ],
)
def test_the_command_line_is_refused_without_repeating_it(cli: Any, setting: str) -> None:
    code, out, err = cli("run", "toy.yaml", "--set", setting)
    assert code == 2 and CANARY not in out + err and err.startswith("rlhf: ")
    assert not places_with(cli.root, CANARY)


def test_a_token_in_a_traceback_is_blotted_out(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "text-of-the-data")
    (cli.root / "text.txt").write_text("text-of-the-data ")
    code, out, err = cli("run", "toy.yaml", "--set", "first.fail=echo")
    assert code == 1 and "text-of-the-data" not in out + err
    assert not places_with(cli.root / "runs", "text-of-the-data")
