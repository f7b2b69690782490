"""How a row's worker processes are started: how many, with how many threads, under which strategy.

One process and several go the same way: the run's fork server (`pipeline.flow.forkserver`) forks one worker a
rank, each with the environment that torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR, ...), and every
worker asserts the world size that it finds. `accelerate launch --cpu --num_processes 2` silently starts one
process, so it is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.flow.config import Places, Settings, parse_settings
from pipeline.flow.forkserver import PRELOAD, ForkServer, Lines, ServerGone

CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as containers see their own


class LaunchSettings(Settings):
    """The `launch:` part of a plan. Nothing here is part of a row's identity; it is recorded."""

    processes: int = Field(default=1, ge=1, description="worker processes (ranks) a row")
    strategy: Literal["single", "ddp", "deepspeed", "fsdp"] = Field(
        default="single", description="how several processes share the work; `single` for one process"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is one")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads a process; default: physical cores at hand / processes"
    )
    zero_stage: Literal[1, 2, 3] = Field(default=2, description="ZeRO stage of the deepspeed strategy")
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what the deepspeed strategy keeps in CPU memory"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed configuration merged over what the two lines above describe",
    )
    preload: bool = Field(default=True, description="import torch and transformers once for all rows of a run")

    @model_validator(mode="after")
    def _one_or_several(self) -> LaunchSettings:
        if self.strategy == "single" and self.processes > 1:
            raise ValueError(
                f"launch.processes is {self.processes}, but launch.strategy is single: "
                "set launch.strategy to ddp, deepspeed or fsdp"
            )
        return self

    def thread_count(self) -> int:
        return self.threads or max(1, physical_cores() // self.processes)


def physical_cores() -> int:
    """Physical cores at hand: this process's affinity without sibling hyperthreads, cut by a cgroup quota."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return max(1, os.cpu_count() or 1)
    cores = {_core_of(cpu) for cpu in cpus}
    quota = _cgroup_quota(CPU_QUOTA)
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def _core_of(cpu: int) -> tuple[str, ...]:
    topology = CPU_TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        return tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return ("cpu", str(cpu))


def _cgroup_quota(path: Path) -> int | None:
    """Whole CPUs granted by cgroup v2 (`max 100000` or `150000 100000`), rounded up; None without a limit."""
    try:
        quota, period = path.read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))


def processes_of(stage: type, launch: LaunchSettings) -> int:
    """How many processes a row of this stage gets: one where the stage says `one_process = True`."""
    return 1 if getattr(stage, "one_process", False) else launch.processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each rank of one node; empty for a single process.

    >>> [env["RANK"] for env in rank_environments(2)]
    ['0', '1']
    """
    if processes == 1:
        return [{}]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def worker_environment(launch: LaunchSettings, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of the fork server and its workers: the user's own, except for threads and ranks."""
    env = dict(os.environ if base is None else base)
    threads = str(launch.thread_count())
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)  # a run started inside a torchrun or a cluster job starts its own ranks
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = threads
    # libgomp's threads spin at barriers by default; where anything else runs on the cores they burn their own work's
    # time: training beside four busy processes was five times faster with a short spin (measured on 2 cores).
    env.setdefault("GOMP_SPINCOUNT", "2000")
    env["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start its pool at import, before the fork
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a look for a GPU by CUDA itself would break it in the forks
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    env.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    env.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if launch.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    if launch.strategy == "deepspeed" and not _may_have_cuda(launch, env):
        env["DS_ACCELERATOR"] = "cpu"
    return env


def _may_have_cuda(launch: LaunchSettings, env: Mapping[str, str]) -> bool:
    hidden = env.get("CUDA_VISIBLE_DEVICES") == ""
    return launch.device != "cpu" and not hidden and Path("/dev/nvidiactl").exists()


def preload_modules(launch: LaunchSettings) -> tuple[str, ...]:
    return PRELOAD if launch.preload else ()


def launch_settings(document: Mapping[str, Any], where: Places | None = None) -> LaunchSettings:
    """The `launch:` mapping of a plan or request, checked; UserError names the key, with `where` also its place."""
    return parse_settings(LaunchSettings, document, "launch", where)


@dataclass(frozen=True)
class Outcome:
    """How a row's workers ended. `message` says why they failed, in one line, None where they did not."""

    code: int = 0
    message: str | None = None
    user: bool = False  # a clear message of ours, not the last line of a traceback
    reported: bool = False  # by the worker itself


class Workers:
    """The worker processes of a run: starts the fork server at the first row and keeps it for the others.

    workers = Workers(launch, log=run_dir / "logs" / "server.log")
    outcome = workers.run(request_path, log=..., processes=1, on_event=print)
    workers.close()
    """

    def __init__(self, launch: LaunchSettings, *, log: Path) -> None:
        self.launch = launch
        self._log = log
        self._server: ForkServer | None = None
        self._at_work = False
        self._signals = 0

    def close(self) -> None:
        """End the server and whatever still runs below it."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @property
    def server_pid(self) -> int | None:
        return self._server.pid if self._server else None

    def start(self) -> ForkServer:
        """Start the server without waiting for its imports; `run` does so by itself."""
        if self._server is None:
            self._server = ForkServer(
                preload=preload_modules(self.launch), env=worker_environment(self.launch), log=self._log
            )
        return self._server

    def signal(self, number: int) -> bool:
        """Pass a signal on to the row at work, the second time as SIGKILL; False where none is at work."""
        if self._server is None or not self._at_work:
            return False
        self._signals += 1
        self._server.signal(number if self._signals == 1 else signal.SIGKILL)
        return True

    def run(self, request: Path, *, log: Path, processes: int, on_event: Callable[[dict[str, Any]], None]) -> Outcome:
        """One row: fork its ranks, hand every event to `on_event`, return how they ended."""
        server = self.start()
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._signals = 0
        try:
            try:
                server.fork(request=request, log=log, ranks=rank_environments(processes), events=write)
            finally:
                os.close(write)
            return self._attend(server, read, on_event)
        except ServerGone as gone:
            self.close()
            return Outcome(1, f"the worker server was ended from outside ({_ended(gone.code)})", user=True)
        finally:
            self._at_work = False
            os.close(read)

    def _attend(self, server: ForkServer, read: int, on_event: Callable[[dict[str, Any]], None]) -> Outcome:
        lines = Lines()
        errors: list[dict[str, Any]] = []
        exited: list[dict[str, Any]] | None = None

        def receive() -> bool:
            """Take what is on the pipe; False at its end."""
            try:
                data = os.read(read, 1 << 16)
            except BlockingIOError:
                return True
            for line in lines.feed(data):
                with contextlib.suppress(ValueError):  # a worker killed in the middle of a line
                    event = json.loads(line)
                    (errors.append if event["event"] == "error" else on_event)(event)
            return bool(data)

        with selectors.DefaultSelector() as selector:
            selector.register(server.socket, selectors.EVENT_READ)
            selector.register(read, selectors.EVENT_READ)
            while exited is None:
                for key, _ in selector.select():
                    if key.fileobj == read:
                        if not receive():
                            selector.unregister(read)
                        continue
                    for reply in server.replies():
                        self._at_work = self._at_work or "forked" in reply
                        exited = reply.get("exited", exited)
        self._at_work = False
        while _readable(read) and receive():
            pass
        return outcome(exited, errors)


def _readable(descriptor: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(0))


def outcome(exited: list[dict[str, Any]], errors: list[dict[str, Any]]) -> Outcome:
    """What happened, from the ranks in the order they ended and the errors they reported.

    The first failure is the cause; ranks that fall over afterwards lost their peer.
    """
    failed = [end for end in exited if end["signal"] or end["code"]]
    if not failed:
        return Outcome()
    first = failed[0]
    told = {error["rank"]: error for error in reversed(errors)}
    error = told.get(first["rank"])
    where = f"rank {first['rank']}: " if len(exited) > 1 else ""
    if error is not None and not first["signal"]:
        return Outcome(first["code"], where + error["message"], user=error["user"], reported=True)
    if first["signal"]:
        return Outcome(1, where + f"the worker was killed ({_ended(-first['signal'])})", user=True)
    return Outcome(first["code"], where + f"the worker ended with exit status {first['code']} and no word", user=True)


def _ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return name + (", often the kernel short of memory" if -code == signal.SIGKILL else "")
