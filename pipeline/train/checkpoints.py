"""State of a row in progress, so that the same command goes on where it was.

    checkpoints = Checkpoints(workspace.checkpoints, fingerprint, ranks)
    found = checkpoints.newest(workspace.say)              # None: nothing was ever completed
    checkpoints.save(step, tensors, state)                 # tensors by name, state as JSON
    checkpoints.finish()                                   # what is still being written is on the disk

    step-000003/tensors.safetensors, state.json, manifest.json      the manifest is written last
                tensors-00001.safetensors, ...                      parts of other ranks, where weights are cut up

A checkpoint is written beside its place by threads while training goes on, and renamed by rank 0 once it is whole;
older ones go only after it verifies. A damaged one is named and the next older is taken; where none verifies the row is
refused. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.flow.artifacts import read_object, sha256_file, sync
from pipeline.flow.errors import Damaged, RowFailed, UserError, anew
from pipeline.flow.launch import sharing

if TYPE_CHECKING:
    from pipeline.train.strategy import Strategy

SCHEMA = 1
WHOLE = "whole"  # the layout of tensors that every rank has alike
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PATIENCE = 5.0  # seconds for the parts of other ranks, of a rank that leaves
WRITING, LEAVING = ".tmp-", ".trash-"  # before the names of checkpoints that are not whole yet, or not any more


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one row; `keep` of them stay."""

    def __init__(self, directory: Path, identity: str, ranks: Strategy, *, keep: int = 2, layout: str = WHOLE) -> None:
        """`identity` is the row's fingerprint: a checkpoint of another row is refused. `layout` is `Engine.layout`."""
        self.directory, self.identity, self.ranks, self.keep = directory, identity, ranks, keep
        self.layout = layout
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._abandoned = threading.Event()  # nobody waits for the parts of other ranks any more

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Every rank calls it. Tensors are copied, and written while the caller goes on: by rank 0, or, where they are
        not the whole (`layout`), by each rank its own part.

        RowFailed where this checkpoint, or the one before it, cannot be written: the older ones stay as they are.
        """
        text = json.dumps(_plain(dict(state)), allow_nan=False)
        self.finish()
        if self.in_parts:  # before anybody writes into it
            place, work = self._place(step)
            with self._agreed(), self._told(place, work, tensors):
                if self.ranks.main:
                    self._begin(work)
        elif not self.ranks.main:
            return
        copied = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._abandoned.clear()
        self._writing = self._thread.submit(self._write, step, copied, text)

    @property
    def in_parts(self) -> bool:
        return self.layout != WHOLE and self.ranks.world > 1

    def finish(self) -> None:
        """Wait for the last `save`; raises what went wrong in it. Every rank calls it, and with parts all raise."""
        if not self.in_parts:
            self._wait()
            return
        with self._agreed():
            if not self.ranks.main:
                self._wait()
        with self._agreed():
            self._wait()

    def leave(self) -> None:
        """The same for a rank that goes whatever the others do: it waits for their parts no longer than PATIENCE."""
        if self.in_parts and self.ranks.main and self._writing is not None:
            with contextlib.suppress(TimeoutError):
                self._writing.exception(PATIENCE)
            self._abandoned.set()
        self._wait()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextlib.contextmanager
    def _agreed(self) -> Iterator[None]:
        """A problem of one rank inside is one of all."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        if problems := [p for p in self.ranks.gather(problem) if p]:
            self._abandoned.set()
            with contextlib.suppress(UserError):
                self._wait()
            raise RowFailed(problems[0])

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: str) -> None:
        place, work = self._place(step)
        with self._told(place, work, tensors):
            if not self.in_parts:
                self._begin(work)
                _write_tensors(tensors, work / TENSORS)
            else:
                part = work / _part(self.ranks.rank)
                beside = work.with_name(f"{work.name}-{self.ranks.rank}")  # a part has its name once it is whole
                _write_tensors(tensors, beside)
                os.rename(beside, part)
                sync(work)
            if self.ranks.main:
                self._await_parts(work)
                self._complete(step, place, work, state)

    def _await_parts(self, work: Path) -> None:
        """The other ranks' threads write into the same directory; what goes wrong there, `finish` tells."""
        missing = [work / _part(rank) for rank in range(1, self.ranks.world)] if self.in_parts else []
        while missing := [part for part in missing if not part.exists()]:
            if self._abandoned.wait(0.02):
                shutil.rmtree(work, ignore_errors=True)
                raise RowFailed(f"checkpoint {work}: {len(missing)} ranks did not write their parts")

    def _place(self, step: int) -> tuple[Path, Path]:
        name = f"step-{step:06d}"
        return self.directory / name, self.directory / (WRITING + name)

    @contextlib.contextmanager
    def _told(self, place: Path, work: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.ranks.main:
                shutil.rmtree(work, ignore_errors=True)
            raise RowFailed(self._cannot_write(place, tensors, error)) from error

    def _begin(self, work: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in (*self.directory.glob(f"{WRITING}*"), *self.directory.glob(f"{LEAVING}*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        work.mkdir()

    def _complete(self, step: int, place: Path, work: Path, state: str) -> None:
        """The tensors are written: the rest, the new name, and away with what is too old."""
        (work / STATE).write_text(state, encoding="utf-8")
        sync(work / STATE)
        files = {path.name: _facts(path) for path in sorted(work.iterdir())}
        manifest = {
            "schema": SCHEMA,
            "identity": self.identity,
            "step": step,
            "world": self.ranks.world,
            "layout": self.layout,
        }
        (work / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")
        sync(work / MANIFEST)
        sync(work)
        if place.exists():  # damaged, else the row had gone on from it
            _remove(place)
        os.rename(work, place)
        sync(self.directory)
        self._verify(place)
        others = [other for other in self._places() if other != place]
        beyond = [other for other in others if _step(other) > step]  # damaged, else the row had gone on from them
        for old in (*beyond, *others[len(beyond) + self.keep - 1 :]):
            _remove(old)

    def _cannot_write(self, place: Path, tensors: Mapping[str, Tensor], error: OSError) -> str:
        left = self._places()
        stays = f"{left[0].name} is the last good one" if left else "there is none before it"
        return (
            f"checkpoint {place}: cannot be written ({error.strerror or error}): it needs {megabytes(tensors)} MB and "
            f"{free_megabytes(self.directory)} MB are free; {stays}: make room and run the same command again"
        )

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; None where none was ever completed.

        Damaged where there are some and none verifies; UserError where world or layout are others now.
        """
        problems = []
        for place in self._places():
            try:
                return self._read(place, self._verify(place))
            except Damaged as problem:
                problems.append(str(problem))
                say(f"{problem}; trying the one before it")
        if problems:
            raise Damaged(f"{self.directory}: no checkpoint verifies ({problems[0]}); {anew(self.directory)}")
        return None

    def clear(self) -> None:
        """Remove all: a row that writes none must not leave an earlier try's."""
        if self.ranks.main:
            for place in self._places():
                _remove(place)
        self.ranks.barrier()

    def _places(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), key=_step, reverse=True)

    def _verify(self, place: Path) -> dict[str, Any]:
        try:
            manifest = read_object(place / MANIFEST, Damaged)
            if odd := [path.name for path in place.iterdir() if path.is_symlink() or not path.is_file()]:
                raise Damaged(f"checkpoint {place}: {odd[0]} is not a regular file")
            listed = {name: dict(facts) for name, facts in manifest["files"].items()}
            known = (manifest["schema"], manifest["identity"], f"step-{manifest['step']:06d}")
            found = {path.name: _facts(path) for path in place.iterdir() if path.name != MANIFEST}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"checkpoint {place}: cannot be read ({error})") from error
        if found.keys() != listed.keys() or not {TENSORS, STATE} <= listed.keys():
            raise Damaged(f"checkpoint {place}: holds {sorted(found)}, its manifest says {sorted(listed)}")
        for name, facts in listed.items():
            if facts != found[name]:
                raise Damaged(f"checkpoint {place / name}: is {found[name]}, its manifest says {facts}")
        if known != (SCHEMA, self.identity, place.name):
            raise Damaged(f"checkpoint {place}: belongs to another row, step or version: {list(known)}")
        return manifest

    def _read(self, place: Path, manifest: Mapping[str, Any]) -> Checkpoint:
        from safetensors.torch import load_file

        if manifest["world"] != self.ranks.world:
            raise UserError(
                f"checkpoint {place}: written by {sharing(manifest['world'])}, now there are "
                f"{self.ranks.world}: go on with launch.processes={manifest['world']}, or {anew(self.directory)}"
            )
        if manifest.get("layout") != self.layout:
            raise UserError(
                f"checkpoint {place}: its weights lie as {manifest.get('layout')}, now as {self.layout}: go on "
                f"with the launch settings that wrote it, or {anew(self.directory)}"
            )
        state = json.loads((place / STATE).read_text(encoding="utf-8"), object_hook=_float)
        own = place / _part(self.ranks.rank)
        return Checkpoint(int(manifest["step"]), load_file(own if own.exists() else place / TENSORS), state)


def _step(place: Path) -> int:
    digits = place.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _part(rank: int) -> str:
    return TENSORS if rank == 0 else f"tensors-{rank:05d}.safetensors"


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # how it reports what the system refused
        raise OSError(str(error)) from error
    sync(path)


def megabytes(tensors: Mapping[str, Tensor]) -> int:
    """What these tensors take in a file, rounded up."""
    return math.ceil(sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6)


def free_megabytes(directory: Path) -> int:
    """What the file system of a directory, there already or not, can still take."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free // 10**6


SPECIAL = "float"  # JSON has no numbers that are not finite: they are written as {"float": "nan"}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {SPECIAL: repr(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _float(value: dict[str, Any]) -> Any:
    return float(value[SPECIAL]) if value.keys() == {SPECIAL} and isinstance(value[SPECIAL], str) else value


def _remove(place: Path) -> None:
    """First out of its name in one step: what is half removed must not look like a damaged checkpoint."""
    leaving = place.with_name(LEAVING + place.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(leaving)
    os.rename(place, leaving)
    shutil.rmtree(leaving)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
