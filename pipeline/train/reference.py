"""The reference's log-probs: computed once, by the policy before its first update, and kept with the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.data.forest import Group, size
from pipeline.data.groups import sum_by_segment
from pipeline.flow.errors import RowFailed

if TYPE_CHECKING:
    from pipeline.train.batches import Plan
    from pipeline.train.loop import Trainer

EXACT = {"fp32": 1e-7, "bf16": 1e-2}  # of the first loss; the forests are the same, so the bits should be too


def with_reference(trainer: Trainer, plan: Plan, workspace: Any) -> list[Group]:
    """The plan's groups, every segment with the fact `reference`: its summed log-prob under the current weights.

    Each is taken on the micro-batch that first trains it, so that the first loss compares equal bits. A record that
    the plan never reaches gets 0.
    """
    left = set(range(len(plan.groups)))
    batches = []
    for step in range(len(plan)):
        new = left.intersection(plan.steps[step])
        if new:  # a step may reach into the next epoch: what it sees again keeps its first value
            batches.append((plan.mine(step), new))
            left -= new
    return _annotate(trainer, plan.groups, batches, workspace)


def held_with_reference(trainer: Trainer, groups: Sequence[Group], workspace: Any) -> list[Group]:
    """This rank's share of held-out groups, with the same fact."""
    mine = trainer.strategy.share([size(g) for g in groups])
    annotated = _annotate(trainer, groups, [(mine, set(mine))], workspace)
    return [annotated[i] for i in mine]


@torch.no_grad()
def _annotate(
    trainer: Trainer, groups: Sequence[Group], batches: Iterable[tuple[Sequence[int], set[int]]], workspace: Any
) -> list[Group]:
    """`batches`: records computed together, and those of them whose values are kept."""
    if trainer.done:
        raise RuntimeError("reference log-probs must be taken before the first update")
    found: dict[int, list[float]] = {}
    with trainer.inference():
        for batch, wanted in batches:
            order = sorted(batch, key=lambda i: size(groups[i]), reverse=True)  # as the loop cuts micro-batches
            at = 0
            for forest in trainer.forests([groups[i] for i in order]):
                sums: list[list[float]] = [[] for _ in range(forest.groups)]
                summed = sum_by_segment(trainer.engine(forest).logprobs_T, forest).tolist()
                for owner, value in zip(forest.group_S.tolist(), summed, strict=True):
                    sums[owner].append(value)
                found |= {order[at + g]: values for g, values in enumerate(sums) if order[at + g] in wanted}
                at += forest.groups
            workspace.progress(len(found) * trainer.strategy.world, len(groups), "references")
    everyone: dict[int, list[float]] = {}
    for part in trainer.strategy.gather([[i, values] for i, values in found.items()]):
        everyone |= dict(part)
    return [
        [
            replace(s, facts={**s.facts, "reference": r})
            for s, r in zip(group, everyone.get(i, [0.0] * len(group)), strict=True)
        ]
        for i, group in enumerate(groups)
    ]


def without_dropout(module: nn.Module) -> bool:
    """Set every dropout of a module to 0 for good; returns whether there was any.

    A ratio to another policy, or to the policy's own past, would otherwise measure the dropout (trl#744). Not by
    `eval()`, which would end gradient checkpointing too.
    """
    found = False
    for part in module.modules():
        for name in ("p",) if isinstance(part, nn.Dropout) else ("attention_dropout",):
            if getattr(part, name, 0.0):
                setattr(part, name, 0.0)
                found = True
    return found


def require_start(trainer: Trainer, groups: Sequence[Group], expected: float, precision: str) -> None:
    """With policy and reference equal the loss has a known value; anything else is a wrong reference."""
    found = trainer.evaluate(groups)["loss"]
    if not abs(found - expected) <= EXACT[precision]:
        raise RowFailed(
            f"at step 0 the loss is {found:.9g}, expected {expected:.9g}: policy and reference are not the same "
            "(dropout active? an adapter merged or left out? another precision?)"
        )
