"""How preference losses are trained: on pairs by the plain loop, on single rated answers with a reference point.

KTO compares every answer with z0, an estimate of KL(policy || reference) that carries no gradient: the mean log ratio
of prompts with answers to other prompts. It belongs to the whole optimiser step, so it is measured before the step,
over all ranks and micro-batches, by one pass without gradient; only then does any answer get its loss.

Its groups are those of `rated_groups`: [prompt] <- [answer] [unrelated answer]. The two answers go through the model
apart, each with the prompt, since only the first one needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from pipeline.algo.preference import Kto, PreferenceLoss, reference_point
from pipeline.data.forest import Forest, Group, size
from pipeline.data.groups import Encoded, comparison_groups, only, rated_groups
from pipeline.train.batches import Plan, Weigh
from pipeline.train.loop import TOKENS, LossFunction, Trainer
from pipeline.train.objectives import preference, unpaired, unrelated_log_ratio, weigh_answers, weigh_pairs
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import Strategy

PARTS = ("answer", "unrelated")
BALANCED = (1.0, 4 / 3)  # Ethayarajh et al. 2024


@dataclass(frozen=True)
class Training:
    """What differs between the two kinds of losses.

    encode    records, chat format and max_tokens to groups
    plan      groups to steps, as `Plan` takes them
    trainer   module, settings and strategy to a trainer
    weigh     what a step's loss is divided by
    parts     the answers that go through the model together, as `with_reference` takes them
    """

    encode: Callable[..., Encoded]
    plan: type[Plan]
    trainer: Callable[..., Trainer]
    weigh: Weigh
    parts: tuple[str, ...]


def training_of(loss: PreferenceLoss) -> Training:
    """How this loss is trained."""
    if isinstance(loss, Kto):
        return Training(rated_groups, UnpairedPlan, partial(UnpairedTrainer, loss), weigh_answers, PARTS)
    encode = partial(comparison_groups, mark_control=loss.content_only)
    trainer = lambda module, *rest, **more: Trainer(module, preference(loss), *rest, **more)
    return Training(encode, Plan, trainer, weigh_pairs("pair"), PARTS[:1])


def imbalance(loss: PreferenceLoss, groups: Sequence[Group]) -> str | None:
    """A sentence where the ratings weigh against each other otherwise than KTO's authors advise, else None."""
    if not isinstance(loss, Kto):
        return None
    ratings = [s.facts["desirable"] for group in groups for s in group if s.facts.get("answer")]
    liked = int(sum(ratings))
    found = loss.balance(liked, len(ratings) - liked)
    if BALANCED[0] <= found <= BALANCED[1]:
        return None
    return (
        f"{liked} of {len(ratings)} answers are desirable: they weigh {found:.3g} to 1 against the others, where "
        "1 to 4/3 is advised; set loss.desirable_weight or loss.undesirable_weight"
    )


class UnpairedPlan(Plan):
    """Steps over rated answers, `tokens` as they are computed: a prompt once with each of its two answers."""

    def __init__(self, groups: Sequence[Group], settings: TrainSettings, **rest: Any) -> None:
        super().__init__(groups, settings, **rest)
        computed = [sum(size(only(group, part)) for part in PARTS) for group in groups]
        self.tokens = sum(computed[i] for step in self.steps for i in step)


class UnpairedTrainer(Trainer):
    """A trainer whose loss gets the reference point of each step, which is logged in nats an answer."""

    def __init__(self, loss: Kto, module: nn.Module, settings: TrainSettings, strategy: Strategy, **rest: Any) -> None:
        super().__init__(module, unpaired(loss, 0.0), settings, strategy, **rest)
        self.loss = loss

    def step(self, work: Any, weights: Mapping[str, float], filler: Group | Forest | None = None) -> dict[str, float]:
        point = self._measure(work)
        figures = super().step([only(group, "answer") for group in work], weights, filler)
        return figures | {"reference_point": point[0], TOKENS: figures[TOKENS] + point[1]}

    def evaluate(
        self, work: Any, weights: Mapping[str, float] | None = None, loss_fn: LossFunction | None = None
    ) -> dict[str, float]:
        """As a trainer does, with the reference point of these groups."""
        if loss_fn is not None:
            return super().evaluate(work, weights, loss_fn)
        point = self._measure(work)
        figures = super().evaluate([only(group, "answer") for group in work], weights)
        return figures | {"reference_point": point[0]}

    def _measure(self, work: Sequence[Group]) -> tuple[float, int]:
        """Sets the reference point of these groups of all ranks; it, and the tokens that it took."""
        figures = super().evaluate([only(group, "unrelated") for group in work], loss_fn=unrelated_log_ratio)
        point = reference_point(figures["log_ratio"])
        self.loss_fn = unpaired(self.loss, point)
        return point, int(figures[TOKENS])
