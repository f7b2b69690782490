"""State of a row in progress, so that the same command goes on where it was.

    checkpoints = Checkpoints(workspace.checkpoints, fingerprint, ranks)
    found = checkpoints.newest(workspace.say)              # None: nothing was ever completed
    checkpoints.save(step, tensors, state)                 # tensors by name, state as JSON

    step-000003/tensors.safetensors, state.json, manifest.json      the manifest is written last

A checkpoint is written beside its place, synced and renamed by rank 0; older ones go only after it verifies. A damaged
one is named and the next older is taken; where none verifies the row is refused. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.flow.errors import Damaged, UserError

if TYPE_CHECKING:
    from pipeline.train.loop import Trainer
    from pipeline.train.strategy import Strategy

SCHEMA = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one row; `keep` of them stay."""

    def __init__(self, directory: Path, identity: str, ranks: Strategy, *, keep: int = 2) -> None:
        """`identity` is the row's fingerprint: a checkpoint of another row is refused."""
        self.directory, self.identity, self.ranks, self.keep = directory, identity, ranks, keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Every rank calls it; rank 0 writes."""
        if self.ranks.main:
            from safetensors.torch import save_file

            self.directory.mkdir(parents=True, exist_ok=True)
            place = self.directory / f"step-{step:06d}"
            work = self.directory / f".tmp-{place.name}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, work / TENSORS)
            (work / STATE).write_text(json.dumps(dict(state), allow_nan=False), encoding="utf-8")
            files = {name: _facts(work / name) for name in (TENSORS, STATE)}
            for name in files:
                _sync(work / name)
            manifest = {"schema": SCHEMA, "identity": self.identity, "step": step, "world": self.ranks.world}
            (work / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")
            _sync(work / MANIFEST)
            _sync(work)
            if place.exists():  # left by a run that was killed before it could use it
                shutil.rmtree(place)
            os.rename(work, place)
            _sync(self.directory)
            self._verify(place)
            for old in self._places()[self.keep :]:
                shutil.rmtree(old)
        self.ranks.barrier()

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; None where none was ever completed.

        Damaged where there are some and none verifies; UserError where the world has another size now.
        """
        places = self._places()
        problems = []
        for place in places:
            try:
                manifest = self._verify(place)
                found = self._read(place, manifest)
            except Damaged as problem:
                problems.append(str(problem))
                say(f"{problem}; trying the one before it")
                continue
            return found
        if problems:
            raise Damaged(
                f"{self.directory}: no checkpoint verifies ({problems[0]}); remove that directory to start the row anew"
            )
        return None

    def clear(self) -> None:
        """Remove all: a row that writes none must not leave an earlier try's."""
        if self.ranks.main:
            for place in self._places():
                shutil.rmtree(place)
        self.ranks.barrier()

    def _places(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), reverse=True)

    def _verify(self, place: Path) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            listed = manifest["files"].items()
            wrong = [(name, facts, _facts(place / name)) for name, facts in listed if _facts(place / name) != facts]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"checkpoint {place}: cannot be read ({error})") from error
        for name, expected, found in wrong:
            raise Damaged(f"checkpoint {place / name}: is {found}, its manifest says {expected}")
        if manifest.get("identity") != self.identity:
            raise Damaged(f"checkpoint {place}: belongs to another row")
        return manifest

    def _read(self, place: Path, manifest: Mapping[str, Any]) -> Checkpoint:
        from safetensors.torch import load_file

        if manifest["world"] != self.ranks.world:
            raise UserError(
                f"checkpoint {place}: written by {manifest['world']} processes, now there are {self.ranks.world}: go "
                f"on with launch.processes={manifest['world']}, or remove {self.directory} to start the row anew"
            )
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        return Checkpoint(int(manifest["step"]), load_file(place / TENSORS), state)


def trainer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Trained parameters and both of Adam's moments with its step, by parameter name. One process or DDP."""
    _require_whole(trainer)
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(trainer):
        found[f"model.{name}"] = parameter
        for key, value in trainer.engine.optimizer.state.get(parameter, {}).items():
            if key in MOMENTS:
                found[f"{key}.{name}"] = torch.as_tensor(value)
    return found


@torch.no_grad()
def restore_trainer(trainer: Trainer, tensors: Mapping[str, Tensor], done: int) -> None:
    """The inverse. Damaged where a parameter has no tensor of its shape."""
    _require_whole(trainer)
    state = trainer.engine.optimizer.state
    for name, parameter in _trained(trainer):
        stored = tensors.get(f"model.{name}")
        if stored is None or stored.shape != parameter.shape:
            raise Damaged(f"the checkpoint holds no {name} of shape {tuple(parameter.shape)}")
        parameter.copy_(stored)
        moments = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
        if moments:
            device = parameter.device
            state[parameter] = {key: value.clone().to(device) for key, value in moments.items()}
    trainer.done = done


def _trained(trainer: Trainer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in trainer.module.named_parameters() if p.requires_grad]


def _require_whole(trainer: Trainer) -> None:
    if hasattr(trainer.engine.module, "zero_optimization_stage"):
        raise UserError("checkpoints inside a row are not written under DeepSpeed: set checkpoint_every to 0")


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
