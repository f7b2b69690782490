"""The plans of several rounds, run whole on a shrunken world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORLD = {
    "documents": 400, "heldout_documents": 30, "conversations": 200, "comparisons": 60, "heldout_pairs": 40,
    "prompts": 40, "dev": 10, "heldout": 20,
}  # fmt: skip
SMALL = {
    **{f"sources.world.{key}": value for key, value in WORLD.items()},
    "stages.pretrain.model": "{preset: test}",
    "stages.pretrain.vocab_size": 400,
    "stages.pretrain.train": "{steps: 150, batch_tokens: 1024, learning_rate: 0.01}",
    "stages.sft.train.batch": 8,
    "stages.reward": "{normalise_prompts: 16, max_new_tokens: 12, train: {batch: 8, epochs: 1}}",
    "stages.rejection.prompts": 16,
    "stages.rejection.sampling.max_new_tokens": 12,
    "stages.rejection.pairs.margin": 0,
    "stages.evaluate.max_new_tokens": 12,
}
ROUNDS = {
    "raft": {},
    "llama2-order": {"stages.ppo": "{iterations: 2, prompts: 8, minibatch: 8, sampling: {max_new_tokens: 12}}"},
    "llama3-rounds": {"stages.dpo.train.batch": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", ROUNDS)
def test_every_row_of_the_plan_runs(plan: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All three share one store, so that rows which they have in common run once."""
    place = tmp_path_factory.getbasetemp() / "rounds"
    place.mkdir(exist_ok=True)
    sets = [part for key, value in {**SMALL, **ROUNDS[plan]}.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / f"{plan}.yaml"), "--json", *sets]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = {row["row"]: row for row in json.loads(done.stdout)["rows"]}
    for name, row in rows.items():
        assert row["status"] in ("executed", "reused"), name
        if row["stage"] == "rejection":
            assert row["metrics"]["chosen"] > 0 and row["metrics"]["best_of_n"]["rows"][-1]["by_gold"] is not None
            assert ("policy" in row["artifacts"]) == (plan != "llama3-rounds")
    if plan == "llama2-order":
        assert rows["rejection@2"]["metrics"]["samples"] == 2 * rows["rejection@2"]["metrics"]["drawn"] == 256
