"""A run whose disk fills up, or that is killed, at any change of a file: a clear message and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import TOYS, write_plan

PROGRAM = (
    "import sys, stages; from toy_stages import TABLE; stages.STAGES = TABLE\n"
    "from pipeline.cli import main; main(sys.argv[1:])"
)
KINDS = {"kill": 0, "torn": -1, "full": errno.ENOSPC}
RUN = ("run", "toy.yaml", "--json")


def rlhf(
    place: Path, shim: Path | None = None, fault: tuple[int, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([TOYS, str(Path(TOYS).parents[1])])}
    if shim and fault:
        number, kind = fault
        environment |= {"LD_PRELOAD": str(shim), "FAULT": f"{place} {number} {KINDS[kind]}"}
    command = [sys.executable, "-c", PROGRAM, *RUN]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=100)


def digests(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    return {f"{row['row']}.{slot}": a["digest"] for row in rows for slot, a in row["artifacts"].items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(rlhf(write_plan(tmp_path_factory.mktemp("whole") / "place")))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("numbers", [(3, 12, 31, 55), pytest.param(range(1, 120), marks=pytest.mark.slow)])
def test_no_change_of_a_file_is_the_end(
    shim: Path, expected: dict[str, str], tmp_path: Path, kind: str, numbers: tuple[int, ...]
) -> None:
    """Every process counts its own changes: in the command line, in the workers' server and in a worker."""
    for number in numbers:
        place = write_plan(tmp_path / f"at{number}")
        struck = rlhf(place, shim, (number, kind))
        if struck.returncode == 0:
            assert digests(struck) == expected, number
            continue
        if kind == "full":
            assert struck.returncode in (1, 2) and "Traceback" not in struck.stderr, (number, struck.stderr)
            assert "MB are free" in struck.stderr and str(place) in struck.stderr, (number, struck.stderr)
        else:
            assert struck.returncode in (-signal.SIGKILL, 1), (number, struck.stderr)
        assert digests(rlhf(place)) == expected, number


@pytest.mark.parametrize("starts", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_of_many_simultaneous_starts_one_wins(tmp_path: Path, starts: int) -> None:
    """The others are refused at once, naming the process that works, or come so late that all is done."""
    place = write_plan(tmp_path / "place")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([TOYS, str(Path(TOYS).parents[1])])}
    command = [sys.executable, "-c", PROGRAM, *RUN, "--set", "first.seconds=3"]
    begun = [
        subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(starts)
    ]
    ended = [(process.communicate(timeout=300), process.returncode) for process in begun]
    done = [json.loads(out)["rows"] for (out, _), code in ended if code == 0]
    assert [[row["status"] for row in rows] for rows in done].count(["executed"] * 3) == 1
    assert all(code in (0, 5) for _, code in ended), ended
    refused = [err for (_, err), code in ended if code == 5]
    assert len(refused) >= starts // 2 and all("process" in err and "Traceback" not in err for err in refused)


def test_two_runs_that_need_the_same_row_compute_it_once(tmp_path: Path) -> None:
    place = write_plan(tmp_path / "place")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([TOYS, str(Path(TOYS).parents[1])])}
    command = [sys.executable, "-c", PROGRAM, *RUN, "--set", "first.seconds=2"]
    begun = [
        subprocess.Popen(
            [*command, "--name", name], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    ended = [(process.communicate(timeout=100), process.returncode) for process in begun]
    assert sorted(code for _, code in ended) == [0, 5], ended
    assert "is in use by process" in next(err for (_, err), code in ended if code == 5)
    late = subprocess.run([*command, "--name", "two"], cwd=place, env=environment, capture_output=True, text=True)
    assert {row["status"] for row in json.loads(late.stdout)["rows"]} == {"reused"}
