"""Where a PPO row stands: its iteration, controller, best weights, and everything a checkpoint must hold of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.algo.kl import KLController, controller
from pipeline.train import ppo_checks
from pipeline.train.loop import CHOICE, Best, Trainer, Watch, evaluation_steps
from pipeline.train.resume import Resume
from pipeline.train.roles import Roles

if TYPE_CHECKING:
    from pipeline.flow.stage import Workspace

SHOWN = ("score", "kl", "explained_variance")


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
        train = config.train
        self.saving = Resume(
            workspace, trainer, self.best, every=train.checkpoint_every, keep=train.keep_last, unit="iteration"
        )
        self.due = evaluation_steps(config.iterations, config.train.evaluations) if watch else set()

    def resume(self) -> int:
        """The number of iterations that are done: those of the newest checkpoint, or 0."""
        own = self.saving.start(into=self.roles.followed())
        if own is None:
            return 0
        self.kl = controller(own["kl"])
        self.rewards.load_state(own["rewards"])
        self.figures, self.dev, self.tokens = own["figures"], own["dev"], own["tokens"]
        self.best_iteration = own["best_iteration"]
        if self.watch:
            self.watch.load(own["watch"])
        return self.saving.saved

    def looks_after(self, iteration: int) -> bool:
        """Whether `finish` will look at dev."""
        return iteration + 1 in self.due

    def finish(self, iteration: int, figures: dict[str, Any], *, samples: int) -> None:
        """After the updates of an iteration: adjust the KL coefficient, look at dev, log, save."""
        done = iteration + 1
        if iteration > (self.config.critic.warmup if self.config.has_critic else 0):
            self.kl = self.kl.update(figures["kl"], samples)  # before, what was sampled is the reference's own
        self.tokens += int(figures["sampled_tokens"] + figures["trained_tokens"])
        self.figures = figures
        ppo_checks.require_finite_weights(dict(self.trainer.module.named_parameters()), self.saving.last_good)
        report = dict(figures)
        if self.watch and self.looks_after(iteration):
            with self.trainer.whole():
                self.dev = self.watch()
            report |= {f"dev/{name}": value for name, value in self.dev.items() if math.isfinite(value)}
            if self.best:
                self.best.offer(self.trainer, self.dev)
                self.best_iteration = done if self.best.step == self.trainer.done else self.best_iteration
        self.workspace.log(step=done, **report)
        shown = {k: figures[k] for k in SHOWN if k in figures}
        self.workspace.progress(done, self.config.iterations, "iterations", **shown)
        self.saving.after(done, self.config.iterations, self._own)

    def _own(self) -> dict[str, Any]:
        """What a checkpoint holds besides the trainer's state."""
        return {
            "kl": self.kl.state(),
            "rewards": self.rewards.state(),
            "figures": self.figures,
            "dev": self.dev,
            "tokens": self.tokens,
            "best_iteration": self.best_iteration,
            "watch": self.watch.state() if self.watch else None,
        }

    def settle(self) -> dict[str, Any]:
        """The weights to keep are those of the best look at dev, where there was one; returns what to record."""
        if self.watch is None:
            return {}
        chose = bool(self.best and self.best.step)
        if self.best and chose:
            self.best.restore(self.trainer)
        kept = self.best_iteration if chose and self.best_iteration else self.config.iterations
        return {"dev": self.dev} | self.watch.chosen(kept, chose=chose, looked=len(self.dev))
