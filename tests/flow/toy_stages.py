"""Stages that copy bytes: the control plane is tested with them, without torch.

A `Mix` row's output is the text of its inputs and its own setting; the other settings make it misbehave.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.flow.artifacts import Comparisons, Documents
from pipeline.flow.config import Settings
from pipeline.flow.errors import NonFinite
from pipeline.flow.stage import Request, Stage, Workspace
from pipeline.flow.store import Store

TABLE = {
    "first": "toy_stages:First",
    "second": "toy_stages:Second",
    "pair": "toy_stages:Pair",
    "last": "toy_stages:Last",
}


class ToyConfig(Settings):
    word: str = "word"
    fail: str = ""
    seconds: float = 0.0
    random: bool = False
    join: bool = False  # two ranks sum 1 + 2 over gloo and append the result


class Toy(Stage):
    version = 1
    sources = ()
    headline: ClassVar[tuple[str, ...]] = ("bytes",)
    Config = ToyConfig

    def _mix(self, texts: list[str], slot: str, workspace: Workspace) -> dict[str, Any]:
        print("toy log line", file=sys.stderr)
        self._misbehave(workspace)
        noise = os.urandom(4).hex() if self.config.random else ""
        sums = _sum_over_ranks(workspace) if self.config.join else ""
        text = "".join(texts) + self.config.word + noise + sums + "\n"
        if int(os.environ.get("RANK", "0")) == 0:
            (workspace.slot(slot) / "data.jsonl").write_text(text)
        workspace.lineage(slot, words=len(text.split()))
        for step in range(3):
            workspace.log(step=step, loss=1.0 / (step + 1))
            workspace.progress(step + 1, 3, unit="tokens", loss=1.0 / (step + 1))
        workspace.say("toy said something")
        return {"bytes": len(text), "tokens": 3, "loss": 0.25}

    def _misbehave(self, workspace: Workspace) -> None:
        fail = self.config.fail
        deadline = time.monotonic() + self.config.seconds
        while time.monotonic() < deadline:
            time.sleep(0.02)
        if fail == "crash":
            raise ValueError("seven is not eight")
        if fail == "memory":
            bytearray(1 << 62)
        if fail == "echo":
            raise ValueError(f"cannot do {os.environ['SOME_TOKEN']}")
        if fail == "nan":
            raise NonFinite("loss is not a number at step 7")
        if fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fail == "server":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        if fail == "rank 1" and os.environ.get("RANK") == "1":
            raise ValueError("only rank 1")


def _sum_over_ranks(workspace: Workspace) -> str:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([workspace.rank + 1])
    dist.all_reduce(value)
    return str(int(value))


def read(artifact: Any) -> str:
    return "".join(path.read_text() for path in artifact.data_files)


class First(Toy):
    name = "first"

    @dataclass
    class Inputs:
        documents: Documents

    @dataclass
    class Outputs:
        documents: Documents

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        return self._mix([read(inputs.documents)], "documents", workspace)


class Second(First):
    name = "second"


class Pair(Toy):
    """One input from above, one that only this row reads."""

    name = "pair"

    @dataclass
    class Inputs:
        documents: Documents
        comparisons: Comparisons

    @dataclass
    class Outputs:
        documents: Documents

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        return self._mix([read(inputs.documents), read(inputs.comparisons)], "documents", workspace)


class Last(Toy):
    name = "last"

    @dataclass
    class Inputs:
        documents: list[Documents] = field(default_factory=list)

    @dataclass
    class Outputs:
        documents: Documents

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        return self._mix([read(one) for one in inputs.documents], "documents", workspace)


def ask(tmp_path: Path, **config: Any) -> Path:
    """A request for the toy stage `first` on one file; the path of request.json."""
    data = tmp_path / "data.txt"
    data.write_text("hello ")
    source = Store(tmp_path / "store").open_source(Documents, [data])
    request = Request(
        row="first", stage="first", target="toy_stages:First", fingerprint="f" * 64, config=config,
        inputs={"documents": source.entry()}, identity={}, seed=0, partial=str(tmp_path / "partial"),
    )  # fmt: skip
    (tmp_path / "partial").mkdir()
    request.write(tmp_path / "partial" / "request.json")
    return tmp_path / "partial" / "request.json"
