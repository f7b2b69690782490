"""A process that imports the heavy libraries once and forks a worker for every row of a run.

Importing torch and transformers takes seconds; seven rows must not pay it seven times. The runner starts one
server a run and talks to it over a socket in JSON lines; the events pipe goes along with `fork`:

    runner -> server   {"fork": {"request": path, "log": path, "ranks": [{env}, ...]}}
                       {"signal": 15}
    server -> runner   {"ready": seconds}
                       {"forked": [pid, ...]}
                       {"exited": [{"rank": 0, "code": 0, "signal": null}, ...]}   in the order they ended

The server never starts a thread and never touches a device, so a fork of it is a clean interpreter: threads,
allocator and distributed environment are set in the child (`pipeline.flow.worker`). When the runner dies, the
kernel ends server and workers with it: nobody goes on writing into a row that nobody guards.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONTROL = ("pipeline.flow.worker", "pipeline.flow.launch", "pipeline.flow.stage")
# What most rows import anyway, then ours that pull in nothing further. Not here: peft, trl, deepspeed and
# datasets, which only some rows pay for.
PRELOAD: tuple[str, ...] = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
    "safetensors.torch",
    "accelerate",
    "pipeline.llama.modeling",
    "pipeline.llama.heads",
    "pipeline.train.loop",
)
GRACE_SECONDS = 5.0  # how long the other ranks may go on after one of them has failed
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])["path"]
from pipeline.flow import forkserver
forkserver.main()
"""


class Lines:
    """Cuts what arrives on a pipe or socket into lines, keeping an unfinished rest."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line for line in lines if line.strip()]


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere the closed socket tells)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


# -------------------------------------------------------------------------------- the runner's side


class ServerGone(Exception):
    """The server ended while a row was running; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the worker server ended with {code}")
        self.code = code


class ForkServer:
    """Handle on the server process. One gang of workers at a time."""

    def __init__(self, *, preload: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        self._lines = Lines()
        boot = json.dumps({"path": sys.path, "socket": theirs.fileno(), "preload": list(preload)})
        with theirs, open(log, "ab") as sink:
            # A session of its own: a Ctrl-C at the terminal reaches the runner alone, which passes it on
            # once.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, boot],
                pass_fds=[theirs.fileno()],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def fork(self, *, request: Path, log: Path, ranks: Sequence[Mapping[str, str]], events: int) -> None:
        """Start one worker a rank; `events` is the write end of the pipe on which they report."""
        message = {"fork": {"request": str(request), "log": str(log), "ranks": [dict(r) for r in ranks]}}
        try:
            socket.send_fds(self.socket, [json.dumps(message).encode() + b"\n"], [events])
        except OSError as gone:
            raise ServerGone(self.process.wait()) from gone

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps({"signal": number}).encode() + b"\n")

    def replies(self) -> list[dict[str, Any]]:
        """What the server has said; call when the socket is readable. ServerGone at the end of the stream."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            raise ServerGone(self.process.wait())
        return [json.loads(line) for line in self._lines.feed(data)]

    def close(self) -> None:
        """End the server at once, also in the middle of its imports; the kernel takes its workers with it."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


# -------------------------------------------------------------------------------- the server's side


def main() -> None:
    boot = json.loads(sys.argv[1])
    die_with_parent()
    channel = socket.socket(fileno=boot["socket"])
    channel.set_inheritable(False)
    started = time.monotonic()
    _preload([*CONTROL, *boot["preload"]])
    server = _Server(channel)
    server.say({"ready": round(time.monotonic() - started, 3)})
    server.serve()


def _preload(names: Sequence[str]) -> None:
    for name in names:
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except Exception:  # the row that needs it meets the same failure and reports it as its own
            print(f"not preloaded: {name}", file=sys.stderr)
            traceback.print_exc()


class _Server:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.lines = Lines()
        self.gang: dict[int, int] = {}  # pid -> rank, those still running
        self.exited: list[dict[str, Any]] = []
        self.deadline: float | None = None  # when ranks that outlive a failed one are killed
        self.wake_read, wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(wake_write, False)
        self.wake_write = wake_write
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel, selectors.EVENT_READ)
        self.selector.register(self.wake_read, selectors.EVENT_READ)

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.channel.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> None:
        while True:
            timeout = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            for key, _ in self.selector.select(timeout):
                if key.fileobj is self.channel:
                    if not self._read():
                        self._signal(signal.SIGKILL)
                        return
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wake_read, 4096)
            self._reap()
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self._signal(signal.SIGKILL)
                self.deadline = None

    def _read(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self.channel, 1 << 16, 1)
        except ConnectionError:
            return False
        if not data:
            return False
        for line in self.lines.feed(data):
            message = json.loads(line)
            if "fork" in message:
                self._fork(message["fork"], fds[0])
                os.close(fds[0])
            elif "signal" in message:
                self._signal(message["signal"])
        return True

    def _signal(self, number: int) -> None:
        for pid in self.gang:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _fork(self, command: dict[str, Any], events: int) -> None:
        self.exited, self.deadline = [], None
        sys.stdout.flush()
        sys.stderr.flush()
        for env in command["ranks"]:
            rank = int(env.get("RANK", 0))
            pid = os.fork()
            if pid == 0:
                self._child(command, rank, env, events)
            self.gang[pid] = rank
        self.say({"forked": list(self.gang)})

    def _child(self, command: dict[str, Any], rank: int, env: dict[str, str], events: int) -> None:
        """In the forked process: leave everything of the server behind, then work. Never returns."""
        code = 1
        try:
            die_with_parent()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            self.channel.close()
            os.close(self.wake_read)
            os.close(self.wake_write)
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.environ.update(env)
            from pipeline.flow import worker

            code = worker.work(Path(command["request"]), rank=rank, events=events)
        except BaseException:  # past this frame lies the server's own loop
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self.gang:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid not in self.gang:
                continue
            code = os.waitstatus_to_exitcode(status)
            self.exited.append(
                {"rank": self.gang.pop(pid), "code": max(code, 0), "signal": -code if code < 0 else None}
            )
            if code != 0 and self.gang and self.deadline is None:
                self.deadline = time.monotonic() + GRACE_SECONDS
            if not self.gang:
                self.deadline = None
                self.say({"exited": self.exited})
