"""The one training loop: pretraining, SFT, reward model, rejection, DPO, and the update phase of PPO.

A step gets the groups of this rank and the weight of every loss term in them, stated before any forward and
summed over ranks. The loss function returns plain sums by term, and the loop computes

    loss = world * sum over terms of coefficient * sum / global weight

of every micro-batch, so that gradients, averaged by DDP over ranks and added up over micro-batches, are
those of the whole batch however it was cut and shared out. Two tokens at 2.0 and eight at 1.0 give 1.2.

    plan = Plan(groups, settings, seed=seed, strategy=strategy)
    trainer = Trainer(module, loss_fn, settings, strategy, total=len(plan), seed=seed)
    outcome = fit(trainer, plan, workspace, evaluate=lambda: trainer.evaluate(heldout))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest, Group, build, cut, size
from pipeline.flow.errors import Damaged, NonFinite, UserError
from pipeline.flow.heap import Heap
from pipeline.llama.arithmetic import fast_products
from pipeline.llama.precision import chosen_precision
from pipeline.llama.virtual import refuse_checkpointing
from pipeline.train import balance, optim
from pipeline.train.batches import Plan, check_sizes
from pipeline.train.metrics import Number, Sums, exact_sum, merge
from pipeline.train.randomness import seed_dropout
from pipeline.train.resume import Resume
from pipeline.train.settings import TrainSettings
from pipeline.train.spikes import Spikes
from pipeline.train.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class LossSums:
    """What a loss function returns for one forest.

    terms     the summed (not averaged) loss of each term, with gradient; the loop divides by the term's
              global weight
    metrics   (sum, count) by name
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)


class LossFunction(Protocol):
    def __call__(self, module: Callable[..., Any], forest: Forest) -> LossSums:
        """`module` is called exactly once with the forest; nothing inside it may be reached past that
        call.
        """


CHOICE = "choice"  # what a watch calls the figure that decides, where it has one
FEW_STEPS = 10  # below this hardly anything is learnt
Work = Sequence[Group] | Sequence[Forest]
LOSS, TOKENS = "loss/", "tokens"


class Trainer:
    """Steps of one module; the schedule of `settings` spans `total` updates."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction,
        settings: TrainSettings,
        strategy: Strategy,
        *,
        total: int,
        seed: int,
        coefficients: Mapping[str, float] | None = None,
        rates: Mapping[str, float] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        """`coefficients` weigh the terms against each other (1 by default); `rates` as in optim.parameter_groups;
        `parts` are prefixes of parameters whose gradient norms are figures of their own.
        """
        self.module = module
        self.loss_fn = loss_fn
        self.settings = settings
        self.strategy = strategy
        self.total = total
        self.seed = seed
        self.coefficients = dict(coefficients or {})
        self.parts = tuple(parts)
        self.held: tuple[str, ...] = ()  # prefixes of `rates` that do not move for now
        self.done = 0  # steps made, skipped ones too
        self.spikes = Spikes(settings)
        self.routers = balance.Routers(module)
        if settings.skip_spikes is not None and strategy.deepspeed is not None:
            raise UserError(
                "train.skip_spikes: DeepSpeed clears gradients in its update alone, so no step can be skipped under "
                "it; use launch.strategy ddp or fsdp, or leave skip_spikes out"
            )
        module.train()
        if settings.checkpointing:
            enable_checkpointing(module)
        if not strategy.places:
            module.to(strategy.device)
        self.precision = chosen_precision(settings.precision, strategy.device.type)
        self.engine = strategy.engine(module, optim.optimizer(module, settings, rates), self.precision)
        self.heap = Heap()
        self._filler: Forest | None = None

    def step(self, work: Work, weights: Mapping[str, float], filler: Group | Forest | None = None) -> dict[str, float]:
        """One update from this rank's groups (cut here by the token budget) or forests (taken as they are).

        weights   by term, of this rank's work; a global weight of 0 leaves its term out
        filler    stands in where other ranks make more passes; by default the last forest this rank has seen

        Returns loss, loss/<term> where there are several, metrics, gradient_norm, learning_rate, tokens, and under
        `skip_spikes` whether the step was skipped (1 or 0); the same on every rank. NonFinite, before the weights
        are touched, where loss or gradient is not finite.
        """
        number = self.done + 1
        micros = self._micros(work)
        if self.routers:
            weights = {**weights, balance.TERM: sum(_tokens(micro) for micro in micros)}
        scales, passes = self._agree(weights, len(micros))
        sums = Sums()
        with fast_products(self.strategy.device, self.precision):
            for i in range(passes):
                with self.engine.accumulate(last=i == passes - 1):
                    self._pass(number, i, micros[i] if i < len(micros) else None, filler, scales, sums)
        figures = self._figures(sums, scales)
        self._require_finite(number, "loss", figures["loss"], figures)
        norms = {f"gradient_norm/{p.rstrip('.')}": self.engine.part_norm(p) for p in self.parts}
        figures |= {name: norm for name, norm in norms.items() if norm is not None}
        norm = self.engine.gradient_norm(self.settings.clip)
        self._require_finite(number, "gradient norm", norm, figures)
        rate = optim.learning_rate(self.settings, number, self.total)
        spike = self.spikes.found(figures["loss"])
        if self.settings.skip_spikes is not None:
            figures["skipped"] = float(spike)
        if spike:
            self.engine.clear()
            self.done = number
            return figures | {"learning_rate": rate} | ({} if norm is None else {"gradient_norm": norm})
        optim.set_learning_rate(self.engine.optimizer, rate, self.held)
        if self.held:
            self.engine.hold(self.held)
        after = self.engine.update()
        self._require_finite(number, "gradient norm", after, figures)
        self.engine.clear()
        self.done = number
        known = norm if norm is not None else after
        return figures | {"learning_rate": rate} | ({} if known is None else {"gradient_norm": known})

    def evaluate(
        self, work: Work, weights: Mapping[str, float] | None = None, loss_fn: LossFunction | None = None
    ) -> dict[str, float]:
        """Means of the metrics of this rank's groups or forests over all ranks: no dropout, no gradient.

        With `weights`, this rank's as in `step`, also the loss of the whole.
        """
        micros = self._micros(work)
        scales, passes = self._agree(weights or {}, len(micros))
        sums = Sums()
        for i in range(passes):
            forest = self._forest(micros[i] if i < len(micros) else None, None)
            with self.inference():
                out = (loss_fn or self.loss_fn)(self.engine, forest)
            if i < len(micros):
                sums.add(out.metrics)
                sums.add({LOSS + term: (total, 1) for term, total in out.terms.items() if term in scales})
                sums.add({TOKENS: (len(forest), 1)})
        return self._figures(sums, scales)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradient, no dropout, and the arithmetic of training: the same numbers as the forward of a step.

        `trainer.engine(forest, ...)` inside gives what the next step will compute (PPO's ratio is exactly
        1), and frozen models run inside it are comparable bit for bit.
        """
        with evaluating(self.module), torch.no_grad(), self.arithmetic():
            yield

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        with self.engine.autocast(), fast_products(self.strategy.device, self.precision):
            yield

    def whole(self) -> AbstractContextManager[None]:
        """`Engine.whole`: to sample from the module, or to save it."""
        return self.engine.whole()

    def state(self) -> dict[str, Tensor]:
        """`Engine.state`."""
        return self.engine.state()

    def load_state(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Stand where `state` was taken, after `done` updates."""
        self.engine.load_state(tensors)
        self.done = done

    def share(self, groups: Sequence[Group]) -> list[Group]:
        """This rank's part of groups that all ranks hold."""
        return [groups[i] for i in self.strategy.share([size(g) for g in groups])]

    def forests(self, groups: Sequence[Group]) -> list[Forest]:
        """Micro-batches of this rank's groups, built once to be used several times."""
        return [self._forest(micro, None) for micro in self._micros(groups)]

    def _micros(self, work: Any) -> list[Any]:
        if not work or isinstance(work[0], Forest):
            return list(work)
        check_sizes([size(g) for g in work], self.settings.token_budget)
        # similar lengths share a pass: attention works in buckets of length
        ordered = sorted(work, key=size, reverse=True)
        return list(cut(ordered, self.settings.token_budget))

    def _agree(self, weights: Mapping[str, float], micros: int) -> tuple[dict[str, float], int]:
        """coefficient / global weight by term, and how many passes every rank makes."""
        everyone = self.strategy.gather({"weights": {k: float(v) for k, v in weights.items()}, "passes": micros})
        passes = max(rank["passes"] for rank in everyone)
        if not passes:
            raise ValueError("a step without any work on any rank")
        scales: dict[str, float] = {}
        for term in sorted({term for rank in everyone for term in rank["weights"]}):
            weight = exact_sum(rank["weights"].get(term, 0.0) for rank in everyone)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {term} must be finite and at least 0, not {weight}")
            scales[term] = self.coefficients.get(term, 1.0) / weight if weight else 0.0
        return scales, passes

    def _pass(
        self,
        number: int,
        micro: int,
        work: Any,
        filler: Group | Forest | None,
        scales: Mapping[str, float],
        sums: Sums,
    ) -> None:
        forest = self._forest(work, filler)
        seed_dropout(self.seed, number, micro, self.strategy.rank)
        self.routers.forget()
        out = self.loss_fn(self.engine, forest)
        if self.routers:
            terms, metrics = self.routers.taken(forest)
            out = LossSums({**out.terms, **terms}, {**out.metrics, **metrics})
        if unknown := out.terms.keys() - scales.keys():
            raise ValueError(f"loss terms {sorted(unknown)} have no weight; weights are stated for {sorted(scales)}")
        real = work is not None
        parts = [self.strategy.world * scales[term] * total for term, total in out.terms.items()]
        loss = torch.stack([p.float() for p in parts]).sum() * float(real)
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on any trained parameter")
        self.heap.mark()
        self.engine.backward(loss)
        self.heap.tidy()
        if real:
            sums.add({LOSS + term: (total, 1) for term, total in out.terms.items()})
            sums.add(out.metrics)
            sums.add({TOKENS: (len(forest), 1)})

    def _forest(self, work: Any, filler: Group | Forest | None) -> Forest:
        """The forest of a micro-batch, or a real one to go through the motions with."""
        chosen = work if work is not None else filler if filler is not None else self._filler
        if chosen is None:
            raise ValueError("this rank has no work and no filler to keep step with the others")
        if not isinstance(chosen, Forest):
            groups: Any = chosen if work is not None else [chosen]
            chosen = build(groups)
        self._filler = chosen.to(self.strategy.device)
        return self._filler

    def _figures(self, sums: Sums, scales: Mapping[str, float]) -> dict[str, float]:
        totals = merge(self.strategy.gather(sums.totals()))
        terms = {term: totals.pop(LOSS + term, (0.0, 0.0))[0] * scale for term, scale in scales.items()}
        tokens, _ = totals.pop(TOKENS)
        figures = {name: total / count for name, (total, count) in totals.items() if count}
        if terms:
            figures["loss"] = exact_sum(terms.values())  # a metric of that name gives way
        if len(terms) > 1:
            figures |= {LOSS + term: value for term, value in terms.items()}
        return figures | {TOKENS: int(tokens)}

    def _require_finite(self, number: int, what: str, value: float | None, figures: Mapping[str, float]) -> None:
        if value is None or math.isfinite(value):
            return
        self.engine.clear()
        known = ", ".join(f"{k} {v:.6g}" for k, v in figures.items())
        raise NonFinite(
            f"step {number}: {what} is {value} ({known}); the weights are those of step {number - 1}. "
            "Lower learning_rate, or look at the records of this step"
        )


def _tokens(micro: Forest | Sequence[Group]) -> int:
    return len(micro) if isinstance(micro, Forest) else sum(size(group) for group in micro)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last step's figures, all evaluations, and the step whose weights are kept."""

    last: dict[str, float]
    evaluations: list[dict[str, float]]
    kept_step: int
    steps: int
    tokens: int
    chose: bool = False  # whether an evaluation decided which weights are kept
    skipped: int = 0  # steps that were spikes and changed nothing

    @property
    def looks(self) -> list[dict[str, float]]:
        """The figures of the watch alone, as it gave them."""
        return [{k[4:]: v for k, v in e.items() if k.startswith("dev/")} for e in self.evaluations]

    @property
    def kept(self) -> dict[str, float]:
        """The evaluation of the kept weights, empty where there is none."""
        return next((e for e in self.evaluations if e["step"] == self.kept_step), {})


class Watch(Protocol):
    """`pipeline.evaluate.watch.Watch`, which a stage opens on its policy."""

    @property
    def chosen_by(self) -> str | None: ...
    def __call__(self) -> dict[str, float]: ...
    def chosen(self, kept_step: int, *, chose: bool, looked: int) -> dict[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


def fit(
    trainer: Trainer,
    plan: Plan,
    workspace: Any,
    *,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    watch: Watch | None = None,
    best_by: str = "loss",
    figures: Sequence[str] = ("loss", "learning_rate"),
) -> Outcome:
    """Run the plan. Logs every step, evaluates `settings.evaluations` times, ends on the best or the last
    weights. A row that was stopped goes on after its last checkpoint.

    evaluate   figures of the current weights on held-out records, the same on every rank; logged as heldout/<name>
    watch      figures of what the current weights answer; logged as dev/<name>
    best_by    which of the held-out figures decides under `keep: best`, the lowest; a watch that chooses goes first
    """
    settings = trainer.settings
    if len(plan) < FEW_STEPS and trainer.strategy.main:
        steps = "1 optimiser step" if len(plan) == 1 else f"{len(plan)} optimiser steps"
        workspace.say(
            f"only {steps} from {len(plan.groups)} records: hardly anything can be learnt; "
            "give more data, more train.epochs, or a smaller train.batch"
        )
    due = evaluation_steps(len(plan), settings.evaluations) if evaluate or watch else set()
    choosing = bool(watch and watch.chosen_by)
    best_by = CHOICE if choosing else best_by
    best = Best(best_by, choosing) if (choosing or evaluate) and settings.keep == "best" else None
    progress = Resume(workspace, trainer, best, every=settings.checkpoint_every, keep=settings.keep_last)
    evaluations: list[dict[str, float]] = []
    tokens, last = 0, {}
    if (own := progress.start()) is not None:
        tokens, last, evaluations = own["tokens"], own["last"], own["evaluations"]
        if watch:
            watch.load(own["watch"])
        trainer.spikes.load(own["spikes"])
    state = lambda: {
        "tokens": tokens,
        "last": last,
        "evaluations": evaluations,
        "watch": watch.state() if watch else None,
        "spikes": trainer.spikes.state(),
    }
    with progress.stoppable():
        for number in range(trainer.done, len(plan)):
            batch = plan.batch(number)
            started = time.perf_counter()
            last = trainer.step(batch.groups, batch.weights, batch.filler)
            seconds = time.perf_counter() - started
            tokens += int(last[TOKENS])
            if last.get("skipped"):
                workspace.say(f"step {trainer.done}: its loss of {last['loss']:.4g} is a spike, so it changes nothing")
            report = last | {"time/tokens_per_second": last[TOKENS] / seconds}
            if trainer.done in due:
                found, seen = dict(evaluate() if evaluate else {}), _seen(trainer, watch)
                if not math.isfinite(found.get(best_by, 0.0)):
                    raise NonFinite(f"after step {trainer.done}: held-out {best_by} is {found[best_by]}")
                evaluations.append(found | {f"dev/{k}": v for k, v in seen.items()} | {"step": trainer.done})
                report |= {f"heldout/{name}": value for name, value in found.items()}
                report |= {f"dev/{name}": value for name, value in seen.items() if math.isfinite(value)}
                if best:
                    best.offer(trainer, found | seen)
            if trainer.strategy.main:
                workspace.log(step=trainer.done, **report)
                workspace.progress(tokens, plan.tokens, "tokens", **{k: report[k] for k in figures if k in report})
            progress.after(trainer.done, len(plan), state)
    kept = best.restore(trainer) if best and best.step else trainer.done
    chose = bool(best and best.step)
    return Outcome(last, evaluations, kept, trainer.done, tokens, chose=chose, skipped=trainer.spikes.skipped)


def _seen(trainer: Trainer, watch: Watch | None) -> dict[str, float]:
    if watch is None:
        return {}
    with trainer.whole():
        return dict(watch())


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Evenly spaced, the last one at the end.

    >>> sorted(evaluation_steps(10, 4))
    [2, 5, 8, 10]
    """
    return {max(1, round(steps * (i + 1) / evaluations)) for i in range(evaluations)}


class Best:
    """The best weights so far: this rank's own copy of what is trained, in CPU memory."""

    def __init__(self, by: str, higher_is_better: bool) -> None:
        self.by = by
        self.sign = 1.0 if higher_is_better else -1.0
        self.value = -math.inf
        self.step = 0
        self.state: list[Tensor] = []

    def offer(self, trainer: Trainer, found: Mapping[str, float]) -> None:
        """A value that is not finite is never the best."""
        if self.by not in found:
            raise ValueError(f"evaluation gives {sorted(found)}, but the best is chosen by {self.by!r}")
        value = self.sign * found[self.by]
        if math.isfinite(value) and value > self.value:
            self.value, self.step = value, trainer.done
            self.state = [t.detach().to("cpu", copy=True) for t in trainer.engine.held()]

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: JSON values, and tensors by name."""
        tensors = {f"best.{i}": tensor for i, tensor in enumerate(self.state)}
        return {"value": self.value, "step": self.step, "tensors": len(tensors)}, tensors

    def load(self, found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        names = [f"best.{i}" for i in range(found["tensors"])]
        if missing := [name for name in names if name not in tensors]:
            raise Damaged(f"the checkpoint does not hold the best weights whole: no {missing[0]}")
        self.value, self.step, self.state = found["value"], found["step"], [tensors[name] for name in names]

    def restore(self, trainer: Trainer) -> int:
        if self.step != trainer.done:
            trainer.engine.take(self.state)
        return self.step


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule is back in its own (a frozen part may keep it)."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def enable_checkpointing(module: nn.Module) -> None:
    """Recompute activations in every model of `module` that can (transformers' interface)."""
    refuse_checkpointing(module)
    able = [m for m in module.modules() if hasattr(m, "gradient_checkpointing_enable")]
    inside = {id(child) for m in able for child in m.modules() if child is not m}
    for model in (m for m in able if id(m) not in inside):
        # renamed in transformers 5.2x; the old name goes in version 6
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
