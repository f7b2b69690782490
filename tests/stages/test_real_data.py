"""The chain on real preferences, real text and real weights: the plans that ship, a few steps of each.

Nothing is claimed about quality here; README.md has measured figures.
"""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BAD = {"empty assistant": 4, "same role twice in a row": 4, "prompts differ": 4}
STORIES = ["sft", "reward", "ppo", "rejection", "dpo", "evaluate"]


@pytest.fixture(scope="module")
def hh(shared_data: Path) -> Path:
    path = shared_data / "pref_hh_harmless_base" / "harmless_base.dev.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.parent.name} in ../shared/data")
    return path


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as `rlhf import llama2c` writes it, with a chat template."""
    folder = shared_data / "weights_stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder.name} in ../shared/data")
    from pipeline.cli.imports import llama2c

    out = tmp_path_factory.mktemp("models") / "stories"
    llama2c(folder / "stories260K.bin", folder / "tok512.bin", out, chat=True, seed=0)
    return out


@pytest.fixture(scope="module")
def slice_of_hh(hh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its 90 shortest rows, and one that cannot be used: short dialogues end within few tokens."""
    rows = gzip.decompress(hh.read_bytes()).decode().splitlines()
    path = tmp_path_factory.mktemp("hh") / "pairs.jsonl"
    path.write_text("\n".join([*sorted(rows, key=len)[:90], rows[1005]]) + "\n")
    return path


def sets(**values: Any) -> list[str]:
    """sources__pairs__path=x as --set sources.pairs.path=x"""
    pairs = (f"{key.replace('__', '.')}={value}" for key, value in values.items())
    return [word for pair in pairs for word in ("--set", pair)]


def run(directory: Path, plan: str, arguments: list[str]) -> dict[str, dict]:
    """Rows of `rlhf run PLAN --json` by name."""
    command = [sys.executable, "-m", "pipeline", "run", str(CONFIGS / plan), "--json", "--set", "launch.threads=1"]
    done = subprocess.run([*command, *arguments], cwd=directory, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {row["row"]: row for row in json.loads(done.stdout)["rows"]}


def check_evaluation(metrics: dict[str, Any], decided_by: str) -> None:
    assert metrics["decided_by"] == decided_by and metrics["reference"] == "sft"
    assert set(metrics["policies"]) == {"sft", "ppo", "rejection", "dpo"}
    for name, policy in metrics["policies"].items():
        assert policy["gold"] is None and math.isfinite(policy["proxy"])
        rate = policy["win_rate"]
        assert rate is None if name == "sft" else rate["vs"] == "sft" and rate["low"] <= rate["mean"] <= rate["high"]
    card = metrics["reward_model"]
    assert card["labels"]["low"] <= card["labels"]["mean"] <= card["labels"]["high"]
    assert card["length"]["mean"] >= 0.5 and card["length"]["count"] == card["labels"]["count"] > 0


def test_a_chain_from_real_weights_runs(stories: Path, slice_of_hh: Path, tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        "stories.yaml",
        sets(
            sources__base__path=stories,
            sources__chats__path=slice_of_hh,
            sources__pairs__path=slice_of_hh,
            sources__pairs_test__part="[0.5, 1]",
            sft__train__steps=25,
            sft__train__batch=16,
            sft__train__learning_rate=5e-3,
            reward__train__steps=2,
            reward__train__batch=8,
            reward__normalise_prompts=8,
            ppo__iterations=1,
            ppo__prompts=4,
            ppo__epochs=1,
            ppo__sampling="{samples: 2, max_new_tokens: 24}",
            rejection__prompts=16,
            rejection__sampling="{samples: 4, max_new_tokens: 48}",
            evaluate__prompts=4,
            evaluate__max_new_tokens=16,
        ),
    )
    assert list(rows) == STORIES and {row["status"] for row in rows.values()} == {"executed"}
    assert rows["sft"]["metrics"]["read"]["conversations"]["reasons"] == {"empty assistant": 2, "prompts differ": 1}
    assert rows["reward"]["metrics"]["heldout_accuracy_interval"]["count"] > 0
    check_evaluation(rows["evaluate"]["metrics"], "proxy")
    place = Path(rows["evaluate"]["artifacts"]["evaluation"]["path"])
    assert {"evaluation.json", "samples.md"} <= {path.name for path in place.iterdir()}


@pytest.mark.slow
def test_the_chain_on_all_of_hh_skips_and_counts_what_cannot_be_used(
    hh: Path, shared_data: Path, tmp_path: Path
) -> None:
    rows = run(
        tmp_path,
        "hh.yaml",
        sets(
            sources__text__path=shared_data / "pt_tinystories" / "tinystories.dev.jsonl",
            sources__pairs__path=hh,
            pretrain__model="{preset: test}",
            pretrain__train="{steps: 40, batch_tokens: 4096, learning_rate: 0.01}",
            sft__train="{steps: 60, batch: 16, learning_rate: 0.005}",
            stages__reward__train="{steps: 3, batch: 8, keep: last}",
            ppo__iterations=2,
            ppo__prompts=8,
            rejection__prompts=64,
            evaluate__prompts=24,
        ),
    )
    assert list(rows) == ["pretrain", "sft", "reward", "reward@b", *STORIES[2:]]
    reads = {name: row["metrics"]["read"] for name, row in rows.items() if row["metrics"].get("read")}
    for slot in (reads["sft"]["conversations"], reads["reward"]["comparisons"], reads["ppo"]["prompts"]):
        assert (slot["format"], slot["rows"], slot["bad"], slot["reasons"]) == ("hh", 1857, 12, BAD)
        assert slot["records"] + slot["outside the part"] == 1845
    halves = [reads[name]["comparisons"]["records"] for name in ("reward", "reward@b")]
    assert sum(halves) + reads["reward"]["heldout"]["records"] == 1845
    assert rows["reward"]["artifacts"]["model"]["digest"] != rows["reward@b"]["artifacts"]["model"]["digest"]
    metrics = rows["evaluate"]["metrics"]
    check_evaluation(metrics, "heldout")
    assert metrics["heldout_reward_model"]["labels"]["count"] == metrics["reward_model"]["labels"]["count"]
    assert all(math.isfinite(policy["heldout"]) for policy in metrics["policies"].values())


@pytest.mark.slow
def test_the_stories_plan_on_whole_files(stories: Path, hh: Path, shared_data: Path, tmp_path: Path) -> None:
    chats = shared_data / "sft_fastchat_dummy" / "dummy_conversation.dev.jsonl"
    few = sets(reward__train__steps=5, ppo__iterations=2, ppo__prompts=8, rejection__prompts=64, evaluate__prompts=24)
    sources = sets(sources__base__path=stories, sources__chats__path=chats, sources__pairs__path=hh)
    rows = run(tmp_path, "stories.yaml", [*sources, *few])
    assert list(rows) == STORIES
    assert rows["reward"]["metrics"]["read"]["comparisons"]["reasons"] == BAD
    check_evaluation(rows["evaluate"]["metrics"], "proxy")


def test_check_lists_the_quirks_of_hh(hh: Path) -> None:
    from typer.testing import CliRunner

    from pipeline.cli.data import app

    result = CliRunner().invoke(app, ["check", str(hh), "--json"])
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert (found["format"], found["counts"]["rows"], found["counts"]["records"]) == ("hh", 1857, 1845)
    assert found["reasons"] == BAD
    lines: dict[str, list[int]] = {}
    for problem in found["problems"]:
        lines.setdefault(problem["reason"], []).append(problem["line"])
    assert lines == {
        "empty assistant": [71, 418, 742, 886],
        "same role twice in a row": [532, 612, 1061, 1482],
        "prompts differ": [1006, 1567, 1569, 1642],
    }
