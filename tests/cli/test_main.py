"""The command line as a whole: fast help, clear errors, exit codes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.store import run_lock


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from pipeline.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "datasets", "rich.progress"} & set(sys.modules)
assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert ended.returncode == 0, ended.stderr
    for command in ("run", "plan", "estimate", "stage", "show", "lineage", "diff", "gc", "verify", "data", "import"):
        assert f"\n  {command} " in ended.stdout


def test_planning_imports_no_torch(cli: Any) -> None:
    code = """
import sys
import stages
from toy_stages import TABLE
stages.STAGES = TABLE
from pipeline.cli import main
try:
    main(["plan", "toy.yaml", "--json"])
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert ended.returncode == 0, ended.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_bad_settings_are_one_message_and_code_2(cli: Any) -> None:
    code, out, err = cli("run", "toy.yaml", "--set", "first.wrod=x")
    assert (code, out) == (2, "")
    assert err.startswith("rlhf: ") and "did you mean 'word'" in err and "Traceback" not in err
    assert cli("plan", "nowhere.yaml")[0] == 2
    for name in ("../up", "", "odd\udcff"):
        code, _, err = cli("run", "toy.yaml", "--name", name)
        assert code == 2 and f"{name!r} is not a plain name" in err
    assert cli("run", "toy.yaml", "--no-such-option")[0] == 2


def test_a_failing_row_is_code_1_and_still_one_json_document(cli: Any) -> None:
    code, out, err = cli("run", "toy.yaml", "--set", "pair.fail=crash", "--json")
    assert code == 1
    assert [row["status"] for row in json.loads(out)["rows"]] == ["executed", "failed"]
    assert "ValueError: seven is not eight" in err and "pair.log" in err and "Traceback" not in err


def test_a_number_that_is_not_finite_is_code_4(cli: Any) -> None:
    assert cli("run", "toy.yaml", "--set", "first.fail=nan")[0] == 4


def test_a_damaged_file_is_code_3_and_named(cli: Any) -> None:
    document = cli.json("run", "toy.yaml", "--until", "first")
    path = Path(document["rows"][0]["artifacts"]["documents"]["path"]) / "data.jsonl"
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    path.write_text(path.read_text().replace("text", "texT"))
    code, out, err = cli("run", "toy.yaml")
    assert code == 3 and str(path) in err
    code, out, err = cli("verify", "--json")
    assert code == 3 and json.loads(out)["damaged"] == 1 and str(path) in json.loads(out)["rows"][0]["problem"]


def test_a_held_run_directory_is_code_5_at_once(cli: Any) -> None:
    with run_lock(cli.root / "runs" / "toy"):
        began = time.monotonic()
        code, out, err = cli("run", "toy.yaml", "--json")
        assert time.monotonic() - began < 1.0
    assert (code, out) == (5, "")
    assert f"process {os.getpid()} on " in err


def test_an_interrupted_run_is_code_130(cli: Any) -> None:
    code = """
import stages
from toy_stages import TABLE
stages.STAGES = TABLE
from pipeline.cli import main
main(["run", "toy.yaml", "--set", "first.seconds=30", "--json"])
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    log = cli.root / "runs" / "toy" / "logs" / "first.log"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (log.exists() and "toy log line" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert json.loads(out)["rows"][0]["status"] == "interrupted"
    assert "interrupted by SIGINT" in err and "Traceback" not in err
    (partial,) = (cli.root / "store" / "partial").iterdir()
    (partial / "checkpoints" / "step-000003").mkdir(parents=True)
    goes_on = "stopped after step 3, its last checkpoint, and goes on from there"
    assert "first  interrupted" in (shown := cli("show", "toy")[1]) and goes_on in shown
    assert f"stale    {partial.name[:12]}  {goes_on}" in cli("plan", "toy.yaml", "--set", "first.seconds=30")[1]
    assert "never run" in cli("plan", "toy.yaml")[1], "other settings are another row"
    assert f"is not sealed ({partial.name[:12]}): {goes_on}; log: " in cli("show", "toy", "first")[2]


RUN = """
import stages
from toy_stages import TABLE
stages.STAGES = TABLE
from pipeline.cli import main
main(["run", "toy.yaml", "--until", "first"])
"""


@pytest.mark.parametrize("end", ["2>&1 | head -n 1", "2>&-", ">&-", ">&- 2>&-"])
def test_a_run_that_nobody_listens_to_ends_well(cli: Any, end: str) -> None:
    (cli.root / "main.py").write_text(RUN)
    subprocess.run(f"{sys.executable} main.py {end}", shell=True, env=_environment(), capture_output=True, timeout=60)
    summary = json.loads((cli.root / "runs/toy/summary.json").read_text())
    assert (summary["exit_code"], summary["error"]) == (0, None)


def test_what_the_encoding_of_a_terminal_lacks_is_replaced(cli: Any) -> None:
    environment = {**_environment(), "PYTHONIOENCODING": "latin-1"}
    (cli.root / "main.py").write_text(RUN.replace('"--until", "first"', '"--name", "π", "--until", "first"'))
    ended = subprocess.run([sys.executable, "main.py"], env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 0 and b"runs/?" in ended.stdout, ended.stderr
