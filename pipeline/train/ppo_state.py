"""Where a PPO row stands: its iteration, controller, best weights, and everything a checkpoint must hold of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pipeline.algo.kl import KLController, controller
from pipeline.train import ppo_checks
from pipeline.train.checkpoints import Checkpoints, restore_trainer, trainer_tensors
from pipeline.train.loop import CHOICE, Best, Trainer, evaluation_steps
from pipeline.train.roles import Roles

if TYPE_CHECKING:
    from pipeline.flow.stage import Workspace

SHOWN = ("score", "kl", "explained_variance")


class Watch(Protocol):
    """`pipeline.evaluate.watch.Watch`: a stage passes it in."""

    @property
    def chosen_by(self) -> str | None: ...
    def __call__(self, policy: Any) -> dict[str, float]: ...
    def chosen(self, kept_step: int, *, chose: bool, looked: int) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


class Running(Protocol):
    """`pipeline.rollout.rewards.Rewards`: its running statistics."""

    def state(self) -> dict[str, float]: ...
    def load_state(self, state: Mapping[str, float]) -> None: ...


class Progress:
    """`kl` is the controller, `figures` those of the last finished iteration, `tokens` sampled and trained so far."""

    def __init__(
        self,
        workspace: Workspace,
        trainer: Trainer,
        roles: Roles,
        config: Any,
        watch: Watch | None,
        kl: KLController,
        rewards: Running,
    ) -> None:
        self.rewards = rewards
        self.workspace, self.trainer, self.roles, self.config, self.watch = workspace, trainer, roles, config, watch
        self.kl = kl
        self.figures: dict[str, Any] = {}
        self.tokens = 0
        keeps = watch is not None and watch.chosen_by is not None and config.train.keep == "best"
        self.best = Best(CHOICE, higher_is_better=True) if keeps else None
        self.best_iteration: int | None = None
        self.dev: dict[str, float] = {}
        self.checkpoints = Checkpoints(workspace.checkpoints, workspace.fingerprint, trainer.strategy)
        self.every = config.checkpoint_every
        if self.every and trainer.strategy.deepspeed is not None:
            workspace.say("no checkpoints are written inside this row: DeepSpeed holds its state")
            self.every = 0
        self.due = evaluation_steps(config.iterations, config.train.evaluations) if watch else set()

    def resume(self) -> int:
        """The number of iterations that are done: those of the newest checkpoint, or 0."""
        if not self.every:
            self.checkpoints.clear()
        found = self.checkpoints.newest(self.workspace.say) if self.every else None
        if found is None:
            self.workspace.rewind_metrics()
            return 0
        state = found.state
        restore_trainer(self.trainer, found.tensors, state["updates"])
        with torch.no_grad():
            for name, tensor in self.roles.followed().items():
                tensor.copy_(found.tensors[name])
        self.kl = controller(state["kl"])
        self.rewards.load_state(state["rewards"])
        self.figures, self.dev, self.tokens = _back(state["figures"]), state["dev"], state["tokens"]
        if self.best and state["best"]:
            self.best.value, self.best.step = state["best"]["value"], state["best"]["step"]
            self.best_iteration = state["best"]["iteration"]
            self.best.state = [found.tensors[f"best.{i}"] for i in range(state["best"]["tensors"])]
        if self.watch:
            self.watch.load(state["watch"])
        self.workspace.rewind_metrics(state["metrics_size"])
        self.workspace.say(f"goes on after iteration {found.step} of {self.config.iterations}")
        return found.step

    def finish(self, iteration: int, figures: dict[str, Any], *, samples: int) -> None:
        """After the updates of an iteration: adjust the KL coefficient, look at dev, log, save."""
        done = iteration + 1
        if iteration >= max(1, self.config.critic.warmup if self.config.has_critic else 0):
            self.kl = self.kl.update(figures["kl"], samples)  # before, the KL is 0 because nothing has moved
        self.tokens += int(figures["sampled_tokens"] + figures["trained_tokens"])
        self.figures = figures
        saved = self._last_good(done - 1)
        ppo_checks.require_finite_weights(dict(self.trainer.module.named_parameters()), saved)
        report = dict(figures)
        if self.watch and done in self.due:
            self.dev = self.watch(self.roles.policy)
            report |= {f"dev/{name}": value for name, value in self.dev.items() if math.isfinite(value)}
            if self.best:
                self.best.offer(self.trainer, self.dev)
                self.best_iteration = done if self.best.step == self.trainer.done else self.best_iteration
        self.workspace.log(step=done, **report)
        shown = {k: figures[k] for k in SHOWN if k in figures}
        self.workspace.progress(done, self.config.iterations, "iterations", **shown)
        every = self.every
        if every and (done % every == 0 or done == self.config.iterations):
            self._save(done)

    def _last_good(self, done: int) -> str:
        every = self.every
        last = done - done % every if every else 0
        return f"the last good checkpoint is that of iteration {last}" if last else "no checkpoint was written before"

    def _save(self, done: int) -> None:
        tensors: dict[str, Tensor] = {**trainer_tensors(self.trainer), **self.roles.followed()}
        best = None
        if self.best and self.best.step:
            tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best.state)}
            best = {
                "value": self.best.value,
                "step": self.best.step,
                "iteration": self.best_iteration,
                "tensors": len(self.best.state),
            }
        state = {
            "updates": self.trainer.done,
            "kl": self.kl.state(),
            "rewards": self.rewards.state(),
            "figures": _finite(self.figures),
            "dev": _finite(self.dev),
            "tokens": self.tokens,
            "best": best,
            "watch": self.watch.state() if self.watch else {},
            "metrics_size": self.workspace.metrics_size(),
        }
        self.checkpoints.save(done, tensors, state)

    def settle(self) -> dict[str, Any]:
        """The weights to keep are those of the best look at dev, where there was one; returns what to record."""
        if self.watch is None:
            return {}
        chose = bool(self.best and self.best.step)
        if self.best and chose:
            self.best.restore(self.trainer)
        kept = self.best_iteration if chose and self.best_iteration else self.config.iterations
        return {"dev": _finite(self.dev)} | self.watch.chosen(kept, chose=chose, looked=len(self.dev))


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no numbers that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def _back(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in figures.items()}
