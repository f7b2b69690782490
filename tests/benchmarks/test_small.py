"""Every benchmark still runs, on sizes whose figures mean nothing. PPO's rival is installed apart: see `make bench`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

NAMES = ["core", "sft", "generate", "reward", "dpo", "rloo", "scaling", "safety", "estimate", "memory"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", name, "--small", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and all(line["ours"] > 0 and line["rival"] > 0 for line in lines)
