"""One worker process by itself: events on the pipe, a result file, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_stages import ask

from pipeline.flow import worker
from pipeline.flow.errors import RowFailed, no_memory


@pytest.fixture(autouse=True)
def _handlers_put_back() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def work(request: Path, rank: int = 0) -> tuple[int, list[dict[str, Any]]]:
    read, write = os.pipe()
    code = worker.work(request, rank=rank, events=write)
    os.close(write)
    with os.fdopen(read) as pipe:
        return code, [json.loads(line) for line in pipe]


def test_a_row_reports_and_leaves_its_manifest(tmp_path: Path) -> None:
    code, events = work(ask(tmp_path, word="world"))
    assert code == 0
    assert [event["event"] for event in events] == ["metrics", "progress"] * 3 + ["said"]
    assert events[5] == {
        "event": "progress", "done": 3, "total": 3, "unit": "tokens", "figures": {"loss": pytest.approx(1 /
        3)},
    }  # fmt: skip
    manifest = json.loads((tmp_path / "partial" / worker.RESULT).read_text())
    assert manifest["metrics"]["bytes"] == len("hello world\n")
    assert (tmp_path / "partial" / "out" / "documents" / "data.jsonl").read_text() == "hello world\n"
    assert manifest["outputs"]["documents"]["lineage"]["words"] == 2


def test_other_ranks_leave_files_and_result_to_rank_0(tmp_path: Path) -> None:
    code, events = work(ask(tmp_path), rank=1)
    assert (code, events) == (0, [])
    assert not (tmp_path / "partial" / worker.RESULT).exists()


def test_a_crash_is_code_1_with_the_last_line_told_and_the_traceback_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, events = work(ask(tmp_path, fail="crash"))
    assert code == 1
    assert events[-1] == {
        "event": "error", "rank": 0, "code": 1, "message": "ValueError: seven is not eight", "user": False,
    }  # fmt: skip
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "partial" / worker.RESULT).exists()


def test_too_little_memory_points_to_the_estimate(tmp_path: Path) -> None:
    code, events = work(ask(tmp_path, fail="memory"))
    assert code == 1 and events[-1]["message"].startswith("MemoryError")
    assert events[-1]["message"].endswith("; rlhf estimate PLAN says what a row needs and what makes it fit")
    assert no_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"))
    assert not no_memory(RuntimeError("seven is not eight"))


def test_an_error_of_ours_keeps_its_exit_code(tmp_path: Path) -> None:
    code, events = work(ask(tmp_path, fail="nan"))
    assert (code, events[-1]["code"], events[-1]["user"]) == (4, 4, True)
    assert events[-1]["message"] == "loss is not a number at step 7"


def test_a_source_that_changed_before_the_worker_started_is_code_2(tmp_path: Path) -> None:
    request = ask(tmp_path)
    (tmp_path / "data.txt").write_text("longer than before")
    code, events = work(request)
    assert (code, events[-1]["code"], events[-1]["user"]) == (2, 2, True)
    assert events[-1]["message"] == f"{tmp_path / 'data.txt'} changed while the row ran; run the same command again"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int) -> None:
    request = ask(tmp_path, seconds=20.0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert work(request)[0] == code


def test_a_world_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker.assert_world(1)
    with pytest.raises(RowFailed, match="launch.processes is 2, but the worker found a world of 1"):
        worker.assert_world(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    worker.assert_world(2)


def test_a_world_that_the_stage_never_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    worker.leave_world(1)
    with pytest.raises(RowFailed, match="never joined"):
        worker.leave_world(2)


def test_what_one_rank_writes_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of several ranks share a pipe: an error stays below what the kernel writes in one piece."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    read, write = os.pipe()
    worker.Events(write, rank=1).error("é" * 100_000, code=1, user=False)
    os.close(write)
    with os.fdopen(read) as pipe:
        line = pipe.read()
    assert len(line.encode()) <= 4096 and json.loads(line)["rank"] == 1
