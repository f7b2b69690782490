"""`rlhf estimate`: a table for people, one document for programs, one message for what cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.cli.estimate import duration, quantity

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
LORA, EIGHT = (str(ROOT / "configs" / f"llama3-8b-{kind}.yaml") for kind in ("lora", "zero3"))


def rlhf(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["estimate", *args])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_a_table_for_people(capsys: Any):
    code, out, err = rlhf(capsys, QUICKSTART)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("cpu: ") and lines[0].endswith("of which 40% are used")
    assert lines[1].split()[:3] == ["row", "trained", "frozen"]
    assert lines[3].split()[:3] == ["pretrain", "918,656", "0"] and "!" not in out


def test_json_is_one_document(capsys: Any):
    code, out, err = rlhf(capsys, EIGHT, "--model", "llama-3-8b", "--device", "a100-40", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["device"] == {"name": "a100-40", "bf16": 312e12, "fp32": 19.5e12, "memory": 40e9}
    row = next(row for row in document["rows"] if row["row"] == "ppo")
    assert set(row) == {
        "row", "stage", "trained", "frozen", "ranks", "tokens", "per_million", "operations", "seconds", "memory",
        "room", "token_budget", "largest_token_budget", "fits", "advice", "notes",
    }  # fmt: skip
    assert not row["fits"] and row["advice"]
    assert sum(row["memory"]["parts"].values()) == pytest.approx(row["memory"]["total"], abs=20)


def test_a_preset_that_stands_in_for_nothing_is_told(capsys: Any):
    plain = rlhf(capsys, QUICKSTART, "--json")
    code, out, err = rlhf(capsys, QUICKSTART, "--json", "--model", "llama-3-8b")
    assert code == 0 and out == plain[1] and err.startswith("--model llama-3-8b: changes nothing") and not plain[2]
    assert "changes nothing" not in rlhf(capsys, EIGHT, "--model", "llama-3-8b")[2]


def test_where_nothing_fits_it_says_what_to_change(capsys: Any):
    sets = ("--set", "launch.zero_stage=1", "--set", "launch.offload=none")
    code, out, _ = rlhf(capsys, EIGHT, "--model", "llama-3-8b", "--memory", "42", *sets)
    assert code == 0 and "sft: nothing fits (42 GB a rank); --set " in out


@pytest.mark.parametrize("plan", [EIGHT, LORA])
def test_the_plans_for_8b_fit_gpus_of_80_gb(capsys: Any, plan: str):
    _, out, _ = rlhf(capsys, plan, "--model", "llama-3-8b")
    assert "h100: 80 GB" in out and "fits" not in out and "too much" not in out and "!" not in out


def test_a_budget_that_is_too_large_is_told_the_largest(capsys: Any):
    sets = ("--set", "pretrain.train.token_budget=1000000", "--set", "pretrain.train.batch_tokens=4000000")
    _, out, _ = rlhf(capsys, QUICKSTART, *sets, "--memory", "2")
    assert "pretrain: too much (2 GB a rank); --set pretrain.train.token_budget=" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "h1000"), "did you mean 'h100'"),
        (("--utilisation", "1.5"), "--utilisation"),
        (("--memory", "-1"), "--memory"),
        (("--peak", "nan"), "--peak"),
        (("--tokens", "0"), "--tokens"),
        (("--set", "sft.train.token_bugdet=1"), "token_budget"),
    ],
)
def test_bad_input_is_one_message(capsys: Any, options: tuple[str, ...], words: str):
    code, out, err = rlhf(capsys, QUICKSTART, *options)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_policy_without_a_path_is_one_message(capsys: Any):
    code, _, err = rlhf(capsys, EIGHT)
    assert code == 2 and "--set sources.base.path=DIRECTORY, or --model PRESET" in err


def test_numbers_for_people():
    assert [quantity(n) for n in (950, 1.234e6, 4.04e22)] == ["950", "1.23 M", "4.04e+22"]
    assert [duration(s) for s in (0.2, 75, 7300, 260_000)] == ["under 1 s", "1:15", "2:01:40", "3.0 days"]
