"""What a stage is, what it may touch, and how a worker runs one.

    class Stage            name, version, sources, same_tokenizer, Config, Inputs, Outputs, run(),
                           check(), boundaries(), withheld()
    slots_in(cls), slots_out(cls) -> dict[str, Slot]      wiring, read from the dataclass annotations
    class Request          everything a worker receives; Request.read(path), .write(path)
    class Workspace        .row .stage .seed .fingerprint .partial .checkpoints .rank .world .skip_bad .launch
                           .slot(name) .lineage(slot, **facts) .quarantine(name) .log(step=..., **metrics)
                           .progress(done, total, unit=..., **figures) .say(text)
    run_stage(request, emit, rank=0, world=1) -> manifest  (None on ranks other than 0)
    outputs_of(cls, out_dir, lineage) -> {slot: {kind, digest, files, lineage}}

Events given to `emit`, all JSON:
    {"event": "progress", "done": 512, "total": 4096, "unit": "tokens", "figures": {"loss": 2.31}}
    {"event": "metrics", "step": 8, "metrics": {"loss": 2.31}}
    {"event": "said", "text": "training a tokenizer of 4096 tokens on 60000 documents"}

A stage module imports nothing heavy at its top: torch belongs inside `run`, so that planning is fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from .artifacts import SCHEMA, Artifact, describe, from_entry, sync
from .config import Settings, parse_settings

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "trl", "deepspeed")
Emit = Callable[[dict[str, Any]], None]


class Stage:
    """Base of every stage. A subclass names itself and declares what it reads, writes and depends on.

    sources         parts of the package whose code decides the result: "algo", "data/world.py"; the stage's
                    own file always counts
    same_tokenizer  groups of input slots whose tokenizer and template must be the same, because ids or
                    weights cross between them
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    sources: ClassVar[tuple[str, ...]] = ()
    same_tokenizer: ClassVar[tuple[tuple[str, ...], ...]] = ()

    Config: ClassVar[type[Settings]] = Settings
    Inputs: ClassVar[type]
    Outputs: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        """Raise UserError for settings that do not go with the slots that are wired. Runs while planning."""

    @classmethod
    def withheld(cls, config: Any) -> frozenset[str]:
        """Optional outputs that these settings leave out: no row below can name them."""
        return frozenset()

    @classmethod
    def check_names(cls, config: Any, names: Mapping[str, Sequence[str]]) -> None:
        """UserError where settings name a row or source that an input (slot -> names) does not read."""

    @classmethod
    def carried(cls, config: Any, starts: Mapping[str, Any]) -> Any:
        """What is known of the row's model while planning, for the rows that start from it; `starts` is what the rows
        that its inputs read said of theirs (slot -> that, None where nothing is known). UserError where the settings do
        not go with it."""
        return None

    @classmethod
    def boundaries(cls, config: Any) -> tuple[tuple[str, ...], ...]:
        """`same_tokenizer`, or what these settings need of it. "reward[0]" is the first artifact of a list slot."""
        return cls.same_tokenizer

    def run(self, inputs: Any, workspace: Workspace) -> dict[str, Any]:
        """Write every output into `workspace.slot(name)` and return the row's metrics (JSON values)."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------- wiring

A = TypeVar("A", bound=Artifact)
OneOrMore = Annotated[list[A], "one will do"]  # `reward: reward.model` in a plan is a list of one for the stage


@dataclass(frozen=True)
class Slot:
    """One input or output: `list[Policy]` is many, `OneOrMore[Policy]` many with one written without brackets,
    `Policy | None = None` and any default optional."""

    name: str
    kinds: tuple[type[Artifact], ...]
    many: bool = False
    optional: bool = False
    one_will_do: bool = False

    @property
    def expects(self) -> str:
        names = " or ".join(kind.__name__ for kind in self.kinds)
        several = f"one {names} or a list" if self.one_will_do else f"a list of {names}"
        return several if self.many else names


def slots_in(cls: type[Stage]) -> dict[str, Slot]:
    return _slots(cls, "Inputs")


def slots_out(cls: type[Stage]) -> dict[str, Slot]:
    return _slots(cls, "Outputs")


def _slots(cls: type[Stage], which: str) -> dict[str, Slot]:
    declared = getattr(cls, which, None)
    if declared is None or not dataclasses.is_dataclass(declared):
        raise TypeError(f"{cls.__name__}.{which} must be a dataclass")
    hints = typing.get_type_hints(declared, include_extras=True)
    return {f.name: _slot(f, hints[f.name], f"{cls.__name__}.{which}") for f in dataclasses.fields(declared)}


def _slot(declared: dataclasses.Field[Any], hint: Any, owner: str) -> Slot:
    missing = dataclasses.MISSING
    optional = declared.default is not missing or declared.default_factory is not missing
    parts = list(typing.get_args(hint)) if _is_union(hint) else [hint]
    optional = optional or type(None) in parts
    parts = [part for part in parts if part is not type(None)]
    one_will_do = len(parts) == 1 and typing.get_origin(parts[0]) is Annotated
    parts = [typing.get_args(part)[0] if typing.get_origin(part) is Annotated else part for part in parts]
    many = len(parts) == 1 and typing.get_origin(parts[0]) in (list, tuple)
    if many:
        inner = [arg for arg in typing.get_args(parts[0]) if arg is not Ellipsis]
        parts = list(typing.get_args(inner[0])) if _is_union(inner[0]) else inner
    if not parts or not all(isinstance(part, type) and issubclass(part, Artifact) for part in parts):
        raise TypeError(f"{owner}.{declared.name}: {hint} is not an artifact kind, a list or an optional of one")
    return Slot(declared.name, tuple(parts), many, optional, one_will_do)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def load_stage(target: str) -> type[Stage]:
    """The class behind "module:Class"."""
    module, _, name = target.partition(":")
    return typing.cast(type[Stage], getattr(import_module(module), name))


# -------------------------------------------------------------------------------------------------- request


@dataclass(frozen=True)
class Request:
    """All that a worker receives, as JSON.

    inputs    slot -> entry of an artifact, list of entries (for list slots), or None
    identity  what the fingerprint is the digest of: stage, version, code, settings, inputs, seed
    places    digest -> paths of the user's files among the inputs
    roots     digests of the raw data that everything here descends from
    """

    row: str
    stage: str
    target: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    identity: dict[str, Any]
    seed: int
    partial: str
    launch: dict[str, Any] = field(default_factory=dict)
    skip_bad: bool = False
    places: dict[str, list[str]] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    plan: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Request:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def input_digests(self) -> dict[str, Any]:
        """slot -> digest, list of digests, or None."""
        return {slot: _each(value, lambda entry: entry["digest"]) for slot, value in self.inputs.items()}


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    return [function(v) for v in value] if isinstance(value, list) else function(value)


# ------------------------------------------------------------------------------------------------ workspace


class Workspace:
    """What a stage may touch. Metrics and events come from rank 0 alone; elsewhere those calls do nothing."""

    def __init__(self, request: Request, emit: Emit, rank: int = 0, world: int = 1) -> None:
        self.row, self.stage, self.seed = request.row, request.stage, request.seed
        self.fingerprint = request.fingerprint
        self.skip_bad, self.launch = request.skip_bad, dict(request.launch)
        self.partial = Path(request.partial)
        self.out = self.partial / "out"
        self.rank, self.world = rank, world
        self.facts: dict[str, dict[str, Any]] = {}
        self._emit, self._started = emit, time.monotonic()

    def slot(self, name: str) -> Path:
        """The directory that takes the files of one output."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def quarantine(self, name: str) -> Path:
        """The file that takes the refused records of one input; sealed with the row, in no artifact."""
        path = self.out / "quarantine" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def frozen(self) -> Any:
        """`launch.frozen`: how frozen models lie between the phases that read them."""
        return self.launch.get("frozen", "whole")

    @property
    def checkpoints(self) -> Path:
        """Where a stage keeps its state while it works; still there when the same row is tried again."""
        return self.partial / "checkpoints"

    def working(self, name: str) -> Path:
        """A file of a stage's own beside its checkpoints: it too is there when the same row is tried again."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        return self.checkpoints / name

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far: what `rewind_metrics` goes back to."""
        path = self.partial / "metrics.jsonl"
        if not path.exists():
            return 0
        sync(path)  # a checkpoint must not outlive the lines that it counts
        return path.stat().st_size

    def rewind_metrics(self, size: int = 0) -> None:
        """Cut off what was logged after a checkpoint, so that no line appears twice."""
        path = self.partial / "metrics.jsonl"
        if self.rank == 0 and path.exists():
            os.truncate(path, min(size, path.stat().st_size))

    def lineage(self, slot: str, **facts: Any) -> None:
        """Note facts about an output beside its files; not hashed. JSON values."""
        self.facts.setdefault(slot, {}).update(facts)

    def log(self, *, step: int, **metrics: Any) -> None:
        """One line of metrics.jsonl. Numbers that are not finite are written as null."""
        if self.rank != 0:
            return
        clean = jsonable(metrics)
        line = {"step": step, **clean, "time/elapsed": round(time.monotonic() - self._started, 3)}
        with open(self.partial / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._emit({"event": "metrics", "step": step, "metrics": clean})

    def progress(self, done: float, total: float | None = None, unit: str = "tokens", **figures: Any) -> None:
        if self.rank == 0:
            event = {"event": "progress", "done": done, "total": total, "unit": unit}
            self._emit({**event, "figures": jsonable(figures)})

    def say(self, text: str) -> None:
        """One line for people."""
        if self.rank == 0:
            self._emit({"event": "said", "text": text})


def jsonable(value: Any) -> Any:
    """JSON values of numbers (also tensors of one element), strings and containers; NaN becomes None."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a metric must be a number, a string or a container of them, not {type(value).__name__}")


# ------------------------------------------------------------------------------------------------- a worker


def run_stage(request: Request, emit: Emit, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
    """Run one row in this process and return its manifest, ready for `Store.seal` (rank 0; None elsewhere).

    Raises UserError and its subclasses; everything else travels as it is.
    """
    cls = load_stage(request.target)
    config = parse_settings(cls.Config, request.config, request.row)
    opened = {slot: _each(value, from_entry) for slot, value in request.inputs.items()}
    inputs = cls.Inputs(**{slot: value for slot, value in opened.items() if value is not None})
    workspace = Workspace(request, emit, rank, world)
    started = time.time()
    metrics = cls(config).run(inputs, workspace) or {}
    if rank != 0:
        return None
    return {
        "schema": SCHEMA,
        "row": request.row,
        "stage": request.stage,
        "version": cls.version,
        "fingerprint": request.fingerprint,
        "settings": config.model_dump(mode="json"),
        "identity": request.identity,
        "inputs": request.input_digests(),
        "places": request.places,
        "roots": request.roots or [request.fingerprint],
        "outputs": outputs_of(cls, workspace.out, workspace.facts),
        "metrics": jsonable(metrics),
        "environment": environment(request.launch, world),
        "seed": request.seed,
        "started": started,
        "finished": time.time(),
    }


def outputs_of(cls: type[Stage], out: Path, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Hash what a stage wrote: {slot: {kind, digest, files, lineage}}. UserError where one is missing."""
    outputs = {}
    for name, slot in slots_out(cls).items():
        if slot.optional and not (out / name).is_dir():
            continue
        outputs[name] = describe(out / name, slot.kinds[0].kind, jsonable(facts.get(name, {})))
        base = outputs[name]["lineage"].get("base")
        if base is not None and not re.fullmatch(r"[0-9a-f]{64}", str(base)):
            raise ValueError(f"output {name}: an adapter names its base by digest, not as {base!r}")
    return outputs


def environment(launch: Mapping[str, Any], world: int) -> dict[str, Any]:
    """What the result may depend on beyond its identity: recorded, compared in words, never hashed."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": git_revision(),
        "device": _device(),
        "kernel": has_kernel(),
        "world": world,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "launch": dict(launch),
    }


def has_kernel() -> bool:
    """Whether the compiled attention (`pipeline/llama/kernel.c`) was built when this package was installed."""
    return find_spec("pipeline.llama._kernel") is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, with "+" where files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return "cpu"
