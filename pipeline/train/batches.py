"""Which records every optimiser step sees, and which of them are this rank's.

The order is one stream of shuffled epochs, cut into steps; it follows from sizes, settings and seed alone,
so all ranks agree on it without a word and nothing has to be remembered to resume. A batch may reach over
the end of an epoch, and only the very last one may be smaller: every record is used exactly once an epoch.

Legend: N records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.forest import Group, size
from pipeline.flow.errors import UserError
from pipeline.train.randomness import permutation
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import Strategy

Weigh = Callable[[Sequence[Group]], Mapping[str, float]]


@dataclass(frozen=True)
class Batch:
    """One rank's part of an optimiser step.

    weights   by term, of this rank's groups alone; the loop sums them over ranks
    filler    a real group for passes that this rank makes without work of its own
    """

    groups: Sequence[Group]
    weights: Mapping[str, float]
    filler: Group


def weigh_tokens(groups: Sequence[Group]) -> dict[str, float]:
    """{"tokens": summed loss weights of all tokens that something precedes}."""
    return {"tokens": sum(_trained(group) for group in groups)}


def _trained(group: Group) -> float:
    filled: list[bool] = []  # whether a segment or an ancestor of it holds any token
    total = 0.0
    for segment in group:
        preceded = segment.parent >= 0 and filled[segment.parent]
        weights = segment.weights or ()
        total += sum(weights) - (weights[0] if weights and not preceded else 0.0)
        filled.append(preceded or len(segment.ids) > 0)
    return total


class Plan:
    """The steps of a training run: `len(plan)` of them, `plan.tokens` tokens in all, iterated as `Batch`."""

    def __init__(
        self,
        groups: Sequence[Group],
        settings: TrainSettings,
        *,
        seed: int,
        strategy: Strategy,
        weigh: Weigh = weigh_tokens,
    ) -> None:
        self.groups = groups
        self.strategy = strategy
        self.weigh = weigh
        self.sizes = [size(group) for group in groups]
        check_sizes(self.sizes, settings.token_budget)
        self.steps = plan_steps(self.sizes, settings, seed)
        self.tokens = sum(self.sizes[i] for step in self.steps for i in step)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int) -> Batch:
        """This rank's part of step number `step`, counted from 0."""
        groups = [self.groups[i] for i in self.mine(step)]
        return Batch(groups, self.weigh(groups), self.groups[self.steps[step][0]])

    def mine(self, step: int) -> list[int]:
        """Which records of step number `step` are this rank's."""
        chosen = self.steps[step]
        return [chosen[i] for i in self.strategy.share([self.sizes[i] for i in chosen])]


def plan_steps(sizes: Sequence[int], settings: TrainSettings, seed: int) -> list[list[int]]:
    """Indices of the records of every step. UserError where there are no records."""
    if not sizes:
        raise UserError("there is nothing to train on: no record is left after reading and truncation")
    steps: list[list[int]] = []
    current: list[int] = []
    tokens = before = 0  # of the step at hand, and of those before it
    for record in _stream(len(sizes), settings, seed):
        if current and _full(len(current), tokens + sizes[record], settings, before):
            steps.append(current)
            if len(steps) == settings.steps:
                return steps
            before += tokens
            current, tokens = [], 0
        current.append(record)
        tokens += sizes[record]
    return [*steps, current]


def _full(records: int, tokens_with_next: int, settings: TrainSettings, before: int) -> bool:
    if settings.batch_tokens is not None:
        return tokens_with_next > largest_step(settings, settings.batch_tokens, before)
    return records >= settings.batch


def largest_step(settings: TrainSettings, batch_tokens: int, before: int) -> float:
    """Tokens that a step may hold after steps of `before` tokens: grows linearly, then stays at `batch_tokens`."""
    if settings.batch_start is None or settings.batch_growth is None:
        return batch_tokens
    return settings.batch_start + (batch_tokens - settings.batch_start) * min(1.0, before / settings.batch_growth)


def _stream(n: int, settings: TrainSettings, seed: int) -> Iterator[int]:
    """Shuffled epochs one after another: round(epochs * N) records, or without end where steps decide."""
    left = max(1, round(settings.epochs * n)) if settings.steps is None else None
    epoch = 0
    while left is None or left > 0:
        order = permutation(n, seed, "shuffle", epoch)
        order = order if left is None else order[:left]
        yield from order
        left = None if left is None else left - len(order)
        epoch += 1


def check_sizes(sizes: Sequence[int], token_budget: int) -> None:
    """UserError naming the first record that no micro-batch can hold."""
    for number, tokens in enumerate(sizes):
        if tokens > token_budget:
            raise UserError(
                f"training record {number} has {tokens} tokens, more than train.token_budget={token_budget}: "
                "raise it, or lower max_tokens"
            )
