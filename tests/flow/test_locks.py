"""One holder at a time, named; a dead one does not keep its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.flow.errors import Locked
from pipeline.flow.locks import is_held, run_lock

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from pathlib import Path
from pipeline.flow.locks import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_at_once_and_a_dead_one_recovered(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(Locked) as error, run_lock(tmp_path / "run"):
            pass
        assert time.monotonic() - began < 1
        assert error.value.exit_code == 5
        for word in (f"process {process.pid} on", os.uname().nodename, "started 2"):
            assert word in str(error.value)
        assert is_held(tmp_path / "run/run.lock")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with run_lock(tmp_path / "run") as lock:
        assert lock.recovered is not None and lock.recovered["pid"] == process.pid
    with run_lock(tmp_path / "run") as lock:
        assert lock.recovered is None
