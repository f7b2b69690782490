"""What runs inside a worker process: a request in, progress on a pipe, a result out.

Events are JSON lines on the pipe that the runner reads:

    {"event": "progress", "done": 4096, "total": 65536, "unit": "tokens", "figures": {"loss": 2.31}}
    {"event": "metrics", "step": 12, "metrics": {"loss": 2.31}}
    {"event": "said", "text": "training a tokenizer of 4096 tokens on 60000 documents"}
    {"event": "error", "rank": 0, "code": 2, "message": "...", "user": true}

Rank 0 alone reports progress; an error may come from any rank. The result is the row's manifest,
`result.json` beside the request, written by rank 0 last. Standard output and error are the row's log file,
where the traceback of a crash goes. Exit codes: those of `pipeline.flow.errors`, 1 for a crash, 130 and 143
when interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from pipeline.flow import heap, stopping
from pipeline.flow.errors import RowFailed, UserError, no_memory, no_room
from pipeline.flow.secrets import redact

RESULT = "result.json"  # the row's manifest, beside the request
GANG_MESSAGE_BYTES = 3000  # of several ranks an error line stays below PIPE_BUF, so that two never mix


class Events:
    """Write end of the events pipe. A runner that is gone is no error: the kernel ends this process too."""

    def __init__(self, descriptor: int, rank: int) -> None:
        self._descriptor, self._rank = descriptor, rank

    def emit(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def error(self, message: str, *, code: int, user: bool) -> None:
        message = redact(message)
        while "WORLD_SIZE" in os.environ and len(json.dumps(message)) > GANG_MESSAGE_BYTES:
            message = message[: len(message) // 2]
        self.emit({"event": "error", "rank": self._rank, "code": code, "message": message, "user": user})


def work(request_path: Path, *, rank: int, events: int) -> int:
    """Run one row's stage in this process and return the exit code. Never raises."""
    channel = Events(events, rank)
    try:
        stopping.install()
        _work(request_path, rank, channel)
    except stopping.Interrupted as stop:
        return stop.exit_code
    except UserError as error:
        _print_traceback()
        channel.error(str(error), code=error.exit_code, user=True)
        return error.exit_code
    except Exception as error:
        _print_traceback()
        if (full := no_room(error, request_path.parent)) is not None:
            channel.error(full, code=RowFailed.exit_code, user=True)
            return RowFailed.exit_code
        last = "".join(traceback.format_exception_only(error)).strip().splitlines()
        hint = "; rlhf estimate PLAN says what a row needs and what makes it fit" if no_memory(error) else ""
        channel.error((last[0] if last else type(error).__name__) + hint, code=1, user=False)
        return 1
    return 0


def _print_traceback() -> None:
    with contextlib.suppress(OSError):  # the log may be what has no room
        print(redact(traceback.format_exc()), file=sys.stderr)


def _work(request_path: Path, rank: int, channel: Events) -> None:
    heap.keep_freed()
    from pipeline.flow.launch import launch_settings, processes_of
    from pipeline.flow.stage import Request, load_stage, run_stage

    request = Request.read(request_path)
    launch = launch_settings(request.launch)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(launch.thread_count())
    processes = processes_of(load_stage(request.target), launch)
    assert_world(processes)
    manifest = run_stage(request, channel.emit, rank, processes)
    leave_world(processes)
    if manifest is not None:
        _write(request_path.with_name(RESULT), manifest)


def assert_world(processes: int) -> None:
    """The environment names the world that the launch asked for; so does torch.distributed once it is up."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != processes:
        raise RowFailed(f"launch.processes is {processes}, but the worker found a world of {world}")
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        found = distributed.get_world_size()
        if found != processes:
            raise RowFailed(f"launch.processes is {processes}, but torch.distributed has a world of {found}")


def leave_world(processes: int) -> None:
    """After the stage: several processes must have been one world, else each trained a model of its own."""
    if processes == 1:
        return
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        raise RowFailed(
            f"launch.processes is {processes}, but the stage never joined them (torch.distributed is not up)"
        )
    assert_world(processes)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _write(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    os.replace(temporary, path)
