"""Every single change that a checkpoint makes to the disk goes wrong once; the same row then ends on the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["kill", "torn", "full"])
def test_every_change_to_the_disk_may_be_the_last(shim: Path, tmp_path: Path, kind: str) -> None:
    """`kill`: the process dies before it; `torn`: in the middle of it; `full`: it and all later ones find no space."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), str(tmp_path), kind],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["changes"] >= 30  # three saves of three files: written, synced, renamed, the older one removed
