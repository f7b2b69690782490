"""Worker processes: threads, ranks, the fork server, and every way in which a worker can end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_stages import ask

from pipeline.flow import launch as launching
from pipeline.flow.config import Places
from pipeline.flow.errors import UserError
from pipeline.flow.launch import LaunchSettings, Workers, launch_settings, outcome, rank_environments

ONE = LaunchSettings(preload=False, threads=1)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(ONE, log=tmp_path / "server.log")
    yield made
    made.close()


def run(workers: Workers, request: Path, processes: int = 1) -> tuple[Any, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    log = request.parent.parent / "row.log"
    return workers.run(request, log=log, processes=processes, on_event=events.append), events


def test_rows_share_one_server(tmp_path: Path, workers: Workers) -> None:
    pids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ended, events = run(workers, ask(tmp_path / name))
        assert ended.code == 0 and ended.message is None
        assert len(events) == 7
        pids.add(workers.server_pid)
        assert "toy log line" in (tmp_path / name / "row.log").read_text()
    assert len(pids) == 1


@pytest.mark.parametrize(
    ("fail", "code", "said", "user"),
    [
        ("crash", 1, "ValueError: seven is not eight", False),
        ("nan", 4, "loss is not a number at step 7", True),
        ("kill", 1, "the worker was killed (SIGKILL", True),
        ("server", 1, "the worker server was ended from outside (SIGKILL", True),
    ],
)
def test_how_a_row_can_fail(tmp_path: Path, workers: Workers, fail: str, code: int, said: str, user: bool) -> None:
    ended, _ = run(workers, ask(tmp_path, fail=fail))
    assert (ended.code, ended.user) == (code, user)
    assert ended.message.startswith(said)


def test_after_a_killed_server_the_next_row_gets_a_new_one(tmp_path: Path, workers: Workers) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert run(workers, ask(tmp_path / "a", fail="server"))[0].code == 1
    assert run(workers, ask(tmp_path / "b"))[0].code == 0


def test_a_signal_is_passed_on_and_the_second_one_kills(tmp_path: Path, workers: Workers) -> None:
    assert not workers.signal(signal.SIGINT), "no row is at work"
    request = ask(tmp_path, seconds=30.0)
    thread = threading.Thread(target=_when_at_work, args=(workers, tmp_path / "row.log"))
    thread.start()
    began = time.monotonic()
    ended, _ = run(workers, request)
    thread.join()
    assert ended.code == 143 and time.monotonic() - began < 10


def _when_at_work(workers: Workers, log: Path) -> None:
    while not (log.exists() and "toy log line" in log.read_text() and workers.signal(signal.SIGTERM)):
        time.sleep(0.01)


def test_two_ranks_get_the_environment_of_torchrun() -> None:
    first, second = rank_environments(2)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert rank_environments(1) == [{}]


def test_ranks_that_never_meet_are_refused(tmp_path: Path) -> None:
    """The toy stage knows nothing of torch.distributed: two ranks of it are two runs, not one world."""
    settings = LaunchSettings(processes=2, strategy="ddp", preload=False, threads=1)
    pair = Workers(settings, log=tmp_path / "server.log")
    try:
        request = ask(tmp_path)
        _set_launch(request, settings)
        ended, _ = run(pair, request, processes=2)
        assert ended.code == 1 and "never joined them" in ended.message
    finally:
        pair.close()


def test_two_ranks_make_one_world(tmp_path: Path) -> None:
    settings = LaunchSettings(processes=2, strategy="ddp", preload=False, threads=1)
    pair = Workers(settings, log=tmp_path / "server.log")
    try:
        request = ask(tmp_path, join=True)
        _set_launch(request, settings)
        ended, events = run(pair, request, processes=2)
        assert ended.message is None, (tmp_path / "row.log").read_text()
        assert [event["text"] for event in events if event["event"] == "said"] == ["toy said something"]
        assert (tmp_path / "partial" / "out" / "documents" / "data.jsonl").read_text() == "hello word3\n"
    finally:
        pair.close()


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    settings = LaunchSettings(processes=2, strategy="ddp", preload=False, threads=1)
    pair = Workers(settings, log=tmp_path / "server.log")
    try:
        request = ask(tmp_path, fail="rank 1", seconds=0.0)
        _set_launch(request, settings)
        ended, _ = run(pair, request, processes=2)
        assert ended.code == 1 and ended.message.startswith("rank ")
    finally:
        pair.close()


def _set_launch(request: Path, settings: LaunchSettings) -> None:
    from dataclasses import replace

    from pipeline.flow.stage import Request

    replace(Request.read(request), launch=settings.model_dump(mode="json")).write(request)


def test_the_first_rank_that_failed_is_the_cause() -> None:
    exited = [
        {"rank": 1, "code": 0, "signal": signal.SIGKILL},
        {"rank": 0, "code": 1, "signal": None},
    ]
    errors = [{"rank": 0, "code": 1, "message": "connection reset by peer", "user": False}]
    ended = outcome(exited, errors)
    assert ended.message is not None and ended.message.startswith("rank 1: the worker was killed (SIGKILL")
    assert outcome([{"rank": 0, "code": 0, "signal": None}], []).message is None


def test_threads_default_to_the_physical_cores_shared_by_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launching, "physical_cores", lambda: 8)
    assert LaunchSettings().thread_count() == 8
    assert LaunchSettings(processes=3, strategy="ddp").thread_count() == 2
    assert LaunchSettings(threads=5).thread_count() == 5


def test_hyperthreads_and_quotas_do_not_count_as_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, core in ((0, 0), (1, 1), (2, 0), (3, 1)):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(launching, "CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr(launching, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert launching.physical_cores() == 2
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert launching.physical_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert launching.physical_cores() == 2


def test_settings_that_contradict_each_other_name_the_key() -> None:
    said = {("launch",): "one.yaml:2", ("launch", "processes"): "--set launch.processes=2"}
    with pytest.raises(UserError, match="^--set .*=2: launch.processes: 2, but launch.strategy is single: set launch"):
        launch_settings({"processes": 2}, Places(said))
    for idle in ({"zero_stage": 3}, {"offload": "all"}, {"deepspeed": {"zero_optimization": {}}}):
        with pytest.raises(UserError, match=f"launch.{next(iter(idle))}: only strategy deepspeed reads it, and .* ddp"):
            launch_settings({"processes": 2, "strategy": "ddp", **idle})
        launch_settings({"processes": 2, "strategy": "deepspeed", **idle})
    with pytest.raises(UserError, match="launch.threads: .*less than or equal to 1024"):
        launch_settings({"threads": 1025})
    with pytest.raises(UserError, match="did you mean 'threads'"):
        launch_settings({"thread": 2})


def test_a_run_inside_a_cluster_job_starts_its_own_ranks() -> None:
    env = launching.worker_environment(ONE, {"RANK": "3", "WORLD_SIZE": "8", "HOME": "/home/me"})
    assert "RANK" not in env and "WORLD_SIZE" not in env and env["HOME"] == "/home/me"
    assert env["OMP_NUM_THREADS"] == "1" and env["TOKENIZERS_PARALLELISM"] == "false"


def test_deepspeed_without_a_gpu_is_told_so() -> None:
    settings = LaunchSettings(processes=2, strategy="deepspeed", device="cpu", threads=1)
    env = launching.worker_environment(settings, {})
    assert env["DS_ACCELERATOR"] == "cpu" and env["CUDA_VISIBLE_DEVICES"] == ""
