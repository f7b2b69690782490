"""The reference's log-probs: computed once, by the policy before its first update, and kept with the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.data.forest import Group, size
from pipeline.data.groups import answer_sums, only
from pipeline.flow.errors import RowFailed

if TYPE_CHECKING:
    from pipeline.train.batches import Plan
    from pipeline.train.loop import Trainer

EXACT = {"fp32": 1e-7, "bf16": 1e-2}  # of the first loss, relative above 1/4: the forests are the same, so the bits are


PAIRS = ("answer",)


def with_reference(trainer: Trainer, plan: Plan, workspace: Any, parts: Sequence[str] = PAIRS) -> list[Group]:
    """The plan's groups, every segment with the fact `reference`: its summed log-prob under the current weights.

    Each is taken on the micro-batch that first trains it, so that the first loss compares equal bits. A record that
    the plan never reaches gets 0. `parts` are the facts of answers that go through the model together: those of
    comparisons all do, rated ones without their unrelated answers (see `only`).
    """
    left = set(range(len(plan.groups)))
    batches = []
    for step in range(len(plan)):
        new = left.intersection(plan.steps[step])
        if new:  # a step may reach into the next epoch: what it sees again keeps its first value
            batches.append((plan.mine(step), new))
            left -= new
    return _annotate(trainer, plan.groups, batches, workspace, parts)


def held_with_reference(
    trainer: Trainer, groups: Sequence[Group], workspace: Any, parts: Sequence[str] = PAIRS
) -> list[Group]:
    """This rank's share of held-out groups, with the same fact."""
    mine = trainer.strategy.share([size(g) for g in groups])
    annotated = _annotate(trainer, groups, [(mine, set(mine))], workspace, parts)
    return [annotated[i] for i in mine]


@torch.no_grad()
def _annotate(
    trainer: Trainer,
    groups: Sequence[Group],
    batches: Iterable[tuple[Sequence[int], set[int]]],
    workspace: Any,
    parts: Sequence[str],
) -> list[Group]:
    """`batches`: records computed together, and those of them whose values are kept."""
    if trainer.done:
        raise RuntimeError("reference log-probs must be taken before the first update")
    found: dict[str, dict[int, list[float]]] = {part: {} for part in parts}
    with trainer.inference():
        for batch, wanted in batches:
            for part in parts:
                values = _summed(trainer, [only(groups[i], part) for i in batch], only(groups[0], part))
                found[part] |= {i: v for i, v in zip(batch, values, strict=True) if i in wanted}
            workspace.progress(len(found[parts[0]]) * trainer.strategy.world, len(groups), "references")
    everyone: dict[str, dict[int, list[float]]] = {part: {} for part in parts}
    for rank in trainer.strategy.gather({part: list(values.items()) for part, values in found.items()}):
        for part, items in rank.items():
            everyone[part] |= dict(items)
    return [_with_facts(group, {part: everyone[part].get(i) for part in parts}) for i, group in enumerate(groups)]


def _summed(trainer: Trainer, groups: Sequence[Group], filler: Group) -> list[list[float]]:
    """The summed log-probs of every group's segments. All ranks make equally many passes, on `filler` where one has no
    work: each of them gathers weights that are sharded."""
    order = sorted(range(len(groups)), key=lambda i: size(groups[i]), reverse=True)  # as the loop cuts micro-batches
    out: list[list[float]] = [[] for _ in groups]
    forests, at = trainer.forests([groups[i] for i in order]), 0
    passes = max(rank["passes"] for rank in trainer.strategy.gather({"passes": len(forests)}))
    for _ in range(passes - len(forests)):
        trainer.engine(trainer.forests([filler])[0])
    for forest in forests:
        summed_S, _ = answer_sums(trainer.engine(forest).logprobs_T, forest)
        for owner, value in zip(forest.group_S.tolist(), summed_S.tolist(), strict=True):
            out[order[at + owner]].append(value)
        at += forest.groups
    return out


def _with_facts(group: Group, values: Mapping[str, list[float] | None]) -> Group:
    """The group with what was found of each part: a value for every segment of `only(group, part)`, or None."""
    known = dict.fromkeys(range(len(group)), 0.0)
    for part, found in values.items():
        if found is not None:
            known |= zip((i for i, s in enumerate(group) if s.parent < 0 or s.facts.get(part)), found, strict=True)
    return [replace(s, facts={**s.facts, "reference": known[i]}) for i, s in enumerate(group)]


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


def require_start(
    trainer: Trainer,
    groups: Sequence[Group],
    start: Callable[[Mapping[str, float]], float | None],
) -> None:
    """With policy and reference equal the loss has a known value, `start` of its figures; anything else is a wrong
    reference. RowFailed then.
    """
    figures = trainer.evaluate(groups)
    found, expected = figures["loss"], start(figures)
    if expected is None:
        return
    if not abs(found - expected) <= EXACT[trainer.precision] * max(1.0, 4 * expected):
        raise RowFailed(
            f"at step 0 the loss is {found:.9g}, expected {expected:.9g}: policy and reference are not the same "
            "(dropout active? an adapter merged or left out? another precision?)"
        )
