"""Going on with a row that was stopped: what every row that trains saves between two steps, and finds again.

    progress = Resume(workspace, trainer, best, every=100, keep=2, unit="step")
    state = progress.start()                     # None: from the beginning; else the trainer stands where it stood
    with progress.stoppable():
        for number in range(...):
            ...one step...
            progress.after(done, total, lambda: {"tokens": tokens})      # saves where it is due, ends where asked to

Saved are weights, moments and step of the optimiser, the best weights so far, the place in the metrics, and what the
caller adds. Randomness is derived from seed and step, so there is none to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.flow import stopping
from pipeline.flow.errors import Damaged, RowFailed, UserError, anew
from pipeline.train.checkpoints import Checkpoints, free_megabytes, megabytes

if TYPE_CHECKING:
    from pipeline.flow.stage import Workspace
    from pipeline.train.loop import Best, Trainer

AT_ONCE = 2  # checkpoints that must fit: the last good one and the one being written


class Resume:
    """`every` steps a checkpoint, 0 for none; `keep` of them stay. `unit` is what `done` counts, for people."""

    def __init__(
        self, workspace: Workspace, trainer: Trainer, best: Best | None, *, every: int, keep: int, unit: str = "step"
    ) -> None:
        self.workspace, self.trainer, self.best, self.every, self.unit = workspace, trainer, best, every, unit
        layout = trainer.engine.layout
        self.checkpoints = Checkpoints(
            workspace.checkpoints, workspace.fingerprint, trainer.strategy, keep=keep, layout=layout
        )
        self.saved = 0  # `done` of the last checkpoint

    def start(self, into: Mapping[str, Tensor] | None = None) -> Mapping[str, Any] | None:
        """Restore the newest checkpoint and return what the caller had added; None where there is none.

        `into` are tensors besides those of the trainer, saved and restored with them. Damaged where checkpoints are
        there and none is whole; UserError where two would not fit on the disk, before any step is made.
        """
        self.into = dict(into or {})
        if not self.every:
            self.checkpoints.clear()
            self.workspace.rewind_metrics()
            return None
        found = self.checkpoints.newest(self.workspace.say)
        if found is None:
            self.workspace.rewind_metrics()
            self._require_room()
            return None
        state = Stored(found.state, self.checkpoints.directory)
        self.trainer.load_state(found.tensors, state["updates"])
        for name, tensor in self.into.items():
            if name not in found.tensors:
                place = self.checkpoints.directory
                raise Damaged(f"{place}: the checkpoint holds no tensor {name}; {anew(place)}")
            tensor.copy_(found.tensors[name])
        if self.best and state["best"]:
            self.best.load(state["best"], found.tensors)
        self.workspace.rewind_metrics(state["metrics_size"])
        self.workspace.say(f"goes on after {self.unit} {found.step}, from its checkpoint")
        self.saved = found.step
        return Stored(state["own"], self.checkpoints.directory)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """SIGINT and SIGTERM wait for `after`, where there is something to save. What is being written when the block
        ends, in whatever way, is on the disk afterwards."""
        if not self.every:
            yield
            return
        try:
            with stopping.after_steps():
                yield
        except BaseException:
            with suppress(UserError):  # what went wrong first is what is told
                self.checkpoints.leave()
            raise
        self.checkpoints.finish()

    def after(self, done: int, total: int, own: Callable[[], Mapping[str, Any]]) -> None:
        """Between two steps: save where it is due or a signal has come; in that case end the row here.

        Every rank calls it; with several they agree, so that all stop after the same step.
        """
        if not self.every:
            return
        noted = [number for number in self.trainer.strategy.gather(stopping.asked()) if number is not None]
        if noted or done % self.every == 0 or done == total:
            self._save(done, own())
        if noted:
            self._finish_together()
            self.workspace.say(f"stopped after {self.unit} {done} of {total}; the same command goes on from there")
            raise stopping.Interrupted(noted[0])

    def _finish_together(self) -> None:
        """No rank leaves before what rank 0 writes is on the disk: a rank that is gone ends the others soon."""
        problem = None
        try:
            self.checkpoints.finish()
        except UserError as error:
            problem = str(error)
        if told := [p for p in self.trainer.strategy.gather(problem) if p]:
            raise RowFailed(told[0])

    @property
    def last_good(self) -> str:
        """For messages."""
        return (
            f"the last good checkpoint is that of {self.unit} {self.saved}" if self.saved else "there is no checkpoint"
        )

    def _save(self, done: int, own: Mapping[str, Any]) -> None:
        tensors = {**self.trainer.state(), **self.into}
        best = None
        if self.best and self.best.step:
            best, kept = self.best.saved()
            tensors |= kept
        size = self.workspace.metrics_size()
        state = {"updates": self.trainer.done, "best": best, "metrics_size": size, "own": dict(own)}
        self.checkpoints.save(done, tensors, state)
        self.saved = done

    def _require_room(self) -> None:
        trained = {name: p for name, p in self.trainer.module.named_parameters() if p.requires_grad}
        copies = 4 if self.best else 3  # weights, two moments, the best weights
        need, free = AT_ONCE * copies * megabytes(trained), free_megabytes(self.checkpoints.directory)
        if need > free:
            raise UserError(
                f"{self.checkpoints.directory}: two checkpoints need {need} MB and {free} MB are free: make room, "
                "choose another store, or write none (checkpoint_every: 0)"
            )


class Stored(dict[str, Any]):
    """Saved state; Damaged, naming the key, where something that must be there is not."""

    def __init__(self, values: Mapping[str, Any], place: Any) -> None:
        super().__init__(values)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise Damaged(f"{self.place}: the checkpoint's state holds no {key!r}; {anew(self.place)}")
