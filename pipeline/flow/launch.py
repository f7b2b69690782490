"""How a row's worker processes are started: how many, with how many threads, under which strategy.

One process and several go the same way: the run's fork server (`pipeline.flow.forkserver`) forks one worker a
rank, each with the environment that torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR, ...), and every
worker asserts the world size that it finds. `accelerate launch --cpu --num_processes 2` silently starts one
process, so it is not used. With several nodes every node starts its share of the ranks (`pipeline.flow.nodes`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.flow.artifacts import sha256_file
from pipeline.flow.config import Places, Settings, parse_settings, refused
from pipeline.flow.forkserver import GRACE_SECONDS, PRELOAD, ForkServer, Lines, ServerGone
from pipeline.flow.nodes import NOT_SHARED, Link, LinkGone, Say, gather, log_of, node_of

MOST_A_NODE, MOST_THREADS, MOST_NODES = 256, 1024, 1024  # beyond, a slip of the keyboard
DEEPSPEED = ("zero_stage", "offload", "deepspeed")  # what that strategy alone reads
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as containers see their own


class LaunchSettings(Settings):
    """The `launch:` part of a plan. Nothing here is part of a row's identity; it is recorded."""

    processes: int = Field(
        default=1, ge=1, description=f"worker processes (ranks) a row, over all nodes; at most {MOST_A_NODE} on each"
    )
    strategy: Literal["single", "ddp", "deepspeed", "fsdp"] = Field(
        default="single", description="how several processes share the work; `single` for one process"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is one")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        description="CPU threads a process; default: physical cores at hand / processes",
    )
    zero_stage: Literal[1, 2, 3] = Field(default=2, description="ZeRO stage of the deepspeed strategy")
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what the deepspeed strategy keeps in CPU memory"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed configuration merged over what the two lines above describe",
    )
    frozen: Literal["whole", "sharded", "offloaded"] = Field(
        default="whole",
        description="how PPO's reference and reward models lie between the phases that read them: whole on every rank, "
        "cut over the ranks, or in CPU memory",
    )
    preload: bool = Field(default=True, description="import torch and transformers once for all rows of a run")
    nodes: int = Field(
        default=1, ge=1, le=MOST_NODES, description="machines that share the processes; the same command on each"
    )
    node_rank: int | None = Field(
        default=None, ge=0, description="which of them this is; 0 leads. null: NODE_RANK or SLURM_NODEID says"
    )
    main_address: str | None = Field(default=None, min_length=1, description="host name or address of node 0")
    main_port: int = Field(
        default=29500, ge=1, le=65534, description="where node 0 is called; torch.distributed takes the next one"
    )

    @model_validator(mode="after")
    def _nodes_fit(self) -> LaunchSettings:
        if self.nodes > 1 and self.processes % self.nodes:
            raise refused(
                "nodes", f"{self.nodes} cannot share launch.processes equally: {self.processes}, over all nodes"
            )
        if self.processes > MOST_A_NODE * self.nodes:
            raise refused("processes", f"{self.processes}, but there are at most {MOST_A_NODE} on a node")
        if self.nodes > 1 and self.main_address is None:
            raise refused("nodes", f"{self.nodes} nodes: set launch.main_address to a name or address of node 0")
        if self.node_rank is not None and self.node_rank >= self.nodes:
            raise refused("node_rank", f"{self.node_rank}, but launch.nodes is {self.nodes}: nodes count from 0")
        return self

    @model_validator(mode="after")
    def _one_or_several(self) -> LaunchSettings:
        if self.strategy == "single" and self.processes > 1:
            raise refused(
                "processes",
                f"{self.processes}, but launch.strategy is single: set launch.strategy to ddp, deepspeed or fsdp",
            )
        for name in DEEPSPEED:
            default = LaunchSettings.model_fields[name].get_default(call_default_factory=True)
            if self.strategy != "deepspeed" and getattr(self, name) != default:
                raise refused(
                    name,
                    f"only strategy deepspeed reads it, and launch.strategy is {self.strategy}: leave it at {default}, "
                    "or set launch.strategy=deepspeed",
                )
        return self

    def thread_count(self) -> int:
        return self.threads or max(1, physical_cores() // (self.processes // self.nodes))


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


def sharing(world: int, strategy: str = "") -> str:
    """
    >>> sharing(1, "ddp"), sharing(2, "ddp"), sharing(2)
    ('1 process', '2 processes (ddp)', '2 processes')
    """
    return "1 process" if world == 1 else f"{world} processes" + (f" ({strategy})" if strategy else "")


def sharing_of(stage: type, launch: LaunchSettings) -> str:
    """How a row of this stage is shared among processes."""
    return sharing(processes_of(stage, launch), launch.strategy)


def sharing_then(environment: Mapping[str, Any]) -> str:
    """The same of a row that was sealed."""
    return sharing(environment["world"], environment["launch"].get("strategy", ""))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environments(
    processes: int, nodes: int = 1, node: int = 0, main: tuple[str, int] | None = None
) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each rank of one node; empty for a single process.

    `main`: where the ranks meet; null takes a free port of this machine.

    >>> [env["RANK"] for env in rank_environments(4, nodes=2, node=1, main=("host", 29501))]
    ['2', '3']
    """
    if processes == 1:
        return [{}]
    address, port = main or ("127.0.0.1", free_port())
    here = processes // nodes
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(here),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(node * here + rank), "LOCAL_RANK": str(rank)} for rank in range(here)]


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
    node: int = 0  # where


class Workers:
    """The worker processes of a run: starts the fork server at the first row and keeps it for the others.

    workers = Workers(launch, log=run_dir / "logs" / "server.log")
    outcome = workers.run(request_path, log=..., processes=1, on_event=print)
    workers.close()

    Of several nodes' on node 0, `gather` first; on the others `follow`.
    """

    def __init__(self, launch: LaunchSettings, *, log: Path) -> None:
        self.launch, self.node = launch, node_of(launch)
        self._followers: list[Link] = []
        self._leader: Link | None = None
        self._log = log
        self._server: ForkServer | None = None
        self._at_work = False
        self._signals = 0

    def gather(self, say: Say, plan: str) -> None:
        """On node 0 of several: wait for the others, which run the same plan."""
        if self.launch.nodes > 1 and not self._followers:
            self._followers = gather(self.launch, say, plan)

    def close(self, code: int = 0) -> None:
        """End the server and whatever still runs below it, and the other nodes with this exit code."""
        for link in self._followers:
            link.send({"end": code})
            link.close()
        self._followers = []
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
        followers = self._followers if processes > 1 else []
        if followers:
            row = {"request": str(request.absolute()), "digest": sha256_file(request), "log": str(log.absolute())}
            for link in followers:
                link.send({"row": row})
        try:
            ended = self._gang(request, log, processes, on_event, waiting=followers)
        except ServerGone as gone:
            self._kill(followers)
            self.close(1)
            return Outcome(1, f"the worker server was ended from outside ({_ended(gone.code)})", user=True)
        return outcome(ended.exited, ended.errors)

    def follow(self, link: Link, row: Mapping[str, str]) -> None:
        """Elsewhere than on node 0: this node's ranks of the row that node 0 named; node 0 hears how they ended.

        LinkGone where node 0 went away meanwhile.
        """
        request = Path(row["request"])
        first = self.node * self.launch.processes // self.launch.nodes
        there = request.is_file()
        if not there or sha256_file(request) != row["digest"]:  # of an earlier run on a disk of this node's own
            message = NOT_SHARED.format(request, "another file" if there else "not there", self.node)
            error = {"rank": first, "code": 2, "message": message, "user": True}
            link.send({"exited": [{"rank": first, "code": 2, "signal": None}], "errors": [error]})
            return
        self._leader = link
        try:
            log = log_of(Path(row["log"]), self.node)
            ended = self._gang(request, log, self.launch.processes, lambda event: None)
        except ServerGone as gone:
            self.close()
            message = f"the worker server was ended from outside ({_ended(gone.code)})"
            ended = Ended([{"rank": first, "code": 1, "signal": None}], [_error(first, message)])
        finally:
            gone_away, self._leader = self._leader is None, None
        if gone_away:
            raise LinkGone("in the middle of a row")
        link.send({"exited": ended.exited, "errors": ended.errors})

    def _gang(
        self,
        request: Path,
        log: Path,
        processes: int,
        on_event: Callable[[dict[str, Any]], None],
        waiting: Sequence[Link] = (),
    ) -> Ended:
        """Fork this node's ranks; attend to them, and to the nodes that are waited for, until all have ended."""
        server = self.start()
        nodes = self.launch.nodes if processes > 1 else 1
        main = (self.launch.main_address or "", self.launch.main_port + 1) if nodes > 1 else None
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._signals = 0
        try:
            try:
                ranks = rank_environments(processes, nodes, self.node, main)
                server.fork(request=request, log=log, ranks=ranks, events=write)
            finally:
                os.close(write)
            return self._attend(server, read, on_event, waiting)
        finally:
            self._at_work = False
            os.close(read)

    def _attend(
        self, server: ForkServer, read: int, on_event: Callable[[dict[str, Any]], None], waiting: Sequence[Link]
    ) -> Ended:
        lines, errors = Lines(), []  # type: Lines, list[dict[str, Any]]
        gangs: list[list[dict[str, Any]]] = []  # of each node, in the order in which they ended
        elsewhere, here = {link.node for link in waiting}, True
        deadline: float | None = None  # when nodes that outlive a failed one are ended, later on given up
        killed: int | None = None  # how many had ended by then

        def lose(link: Link, how: str) -> None:
            elsewhere.remove(link.node)
            first = link.node * self.launch.processes // self.launch.nodes
            gangs.append([{"rank": first, "code": 1, "signal": None, "node": link.node}])
            errors.append(_error(first, f"node {link.node} ({link.host}) {how}"))

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

        def hear(link: Link) -> bool:
            """Take what another node says; False where it says nothing more to this row."""
            try:
                messages = link.receive()
            except LinkGone:
                if link is self._leader:
                    server.signal(signal.SIGKILL)
                    self._leader = None
                elif link.node in elsewhere:
                    lose(link, "is gone")
                return False
            for number, message in enumerate(messages):
                if "end" in message and link is self._leader:  # `orders` reads it, once the ranks have ended
                    server.signal(signal.SIGKILL)
                    link.unread = messages[number:]
                    return False
                if "signal" in message and link is self._leader:
                    server.signal(message["signal"])
                if "exited" in message and link.node in elsewhere:
                    elsewhere.remove(link.node)
                    gangs.append([end | {"node": link.node} for end in message["exited"]])
                    errors.extend(message["errors"])
            return True

        with selectors.DefaultSelector() as selector:
            selector.register(server.socket, selectors.EVENT_READ)
            selector.register(read, selectors.EVENT_READ)
            for link in (*waiting, *([self._leader] if self._leader else [])):
                selector.register(link.socket, selectors.EVENT_READ, link)
                if link.unread and not hear(link):
                    selector.unregister(link.socket)
            while here or elsewhere:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(left):
                    if key.data is not None and not hear(key.data):
                        selector.unregister(key.fileobj)
                    if key.fileobj == read and not receive():
                        selector.unregister(read)
                    if key.fileobj == server.socket:
                        for reply in server.replies():
                            self._at_work = self._at_work or "forked" in reply
                            if "exited" in reply:
                                gangs.append(reply["exited"])
                                here = self._at_work = False  # a signal need not wait for the other nodes
                if deadline is None and any(_failed(end) for gang in gangs for end in gang):
                    deadline = time.monotonic() + GRACE_SECONDS
                if deadline is not None and time.monotonic() >= deadline:
                    late = [link for link in waiting if link.node in elsewhere]
                    if killed is None:
                        server.signal(signal.SIGKILL)
                        self._kill(late)
                        killed = len(gangs)
                    else:
                        for link in late:
                            lose(link, "does not answer")
                    deadline = time.monotonic() + GRACE_SECONDS
        while _readable(read) and receive():
            pass
        first = sorted(gangs[:killed], key=lambda gang: _blame(gang, errors))
        return Ended([end for gang in (*first, *gangs[len(first) :]) for end in gang], errors)

    def _kill(self, links: Sequence[Link]) -> None:
        for link in links:
            link.send({"signal": signal.SIGKILL})


@dataclass(frozen=True)
class Ended:
    """How ranks ended, the cause first, and the errors that they reported."""

    exited: list[dict[str, Any]]
    errors: list[dict[str, Any]]


def _error(rank: int, message: str) -> dict[str, Any]:
    return {"rank": rank, "code": 1, "message": message, "user": True}


def asked_to_stop(code: int) -> bool:
    """Whether a worker's exit code says that SIGINT or SIGTERM reached it."""
    return code - 128 in (signal.SIGINT, signal.SIGTERM)


def _failed(end: Mapping[str, Any]) -> bool:
    return bool(end["signal"] or end["code"])


def _blame(gang: Sequence[Mapping[str, Any]], errors: Sequence[Mapping[str, Any]]) -> int:
    """Which node's failure is the cause, lowest first: nodes have no common clock, but a rank that lost its peers
    reports a crash, and one that fails by itself most often has a clear message or was killed."""
    first = next((end for end in gang if _failed(end)), None)
    if first is None:
        return 3
    if asked_to_stop(first["code"]) or any(e["rank"] == first["rank"] and e["user"] for e in errors):
        return 0
    return 1 if first["signal"] else 2


def _readable(descriptor: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(0))


def outcome(exited: list[dict[str, Any]], errors: list[dict[str, Any]]) -> Outcome:
    """What happened, from the ranks in the order they ended and the errors they reported.

    The first failure is the cause; ranks that fall over afterwards lost their peer.
    """
    failed = [end for end in exited if _failed(end)]
    if not failed:
        return Outcome()
    first = failed[0]
    told = {error["rank"]: error for error in reversed(errors)}
    error = told.get(first["rank"])
    node = first.get("node", 0)
    where = f"rank {first['rank']}{f' on node {node}' if node else ''}: " if len(exited) > 1 else ""
    if error is not None and not first["signal"]:
        return Outcome(first["code"], where + error["message"], error["user"], True, node)
    if first["signal"]:
        return Outcome(1, where + f"the worker was killed ({_ended(-first['signal'])})", user=True, node=node)
    silent = f"the worker ended with exit status {first['code']} and no word"
    return Outcome(first["code"], where + silent, user=True, node=node)


def _ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return name + (", often the kernel short of memory" if -code == signal.SIGKILL else "")
