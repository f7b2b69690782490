"""What would make a row fit that does not: one change, or as few together as will do.

advice(estimate) -> "train.checkpointing=true"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pipeline.estimate import memory
from pipeline.estimate.memory import Layout, Work
from pipeline.estimate.rows import Estimate
from pipeline.llama.adapter_settings import LoraSettings


@dataclass(frozen=True)
class Change:
    """`sets`: what a user adds to the command; `kind`: of several of one kind at most one is made."""

    kind: str
    sets: str
    makes: Callable[[Work], Work]


def advice(found: Estimate) -> str:
    """In words: what to set, with the budget that fits then; or that nothing here is enough."""
    changes = _changes(found)
    for together in range(1, 4):
        fitting = [
            (chosen, budget)
            for chosen in combinations(changes, together)
            if len({change.kind for change in chosen}) == together
            if (budget := memory.largest_budget(_changed(found.work, chosen), found.room))
        ]
        if fitting:
            return "; or ".join(_told(found, chosen, budget) for chosen, budget in fitting[:4])
    least = min(memory.peak(_changed(found.work, [c]), found.work.longest).total for c in changes) if changes else 0.0
    return (
        f"no change here is enough: one alone leaves {memory.human(least)} of {memory.human(found.room)} a rank; "
        "take more ranks, a larger device, a smaller model or shorter records (max_tokens)"
    )


def _told(found: Estimate, chosen: Sequence[Change], budget: int) -> str:
    sets = [f"--set {change.sets.format(row=found.row)}" for change in chosen]
    if budget < found.work.token_budget:
        sets.append(f"--set {found.row}.{found.key}={budget}")
    return " ".join(sets)


def _changed(work: Work, chosen: Sequence[Change]) -> Work:
    for change in chosen:
        work = change.makes(work)
    return work


def _changes(found: Estimate) -> list[Change]:
    """Those that this row and its launch leave open, the cheapest in time first."""
    work, changes = found.work, []  # type: Work, list[Change]
    layout = work.layout
    if work.trained and not work.checkpointing:
        changes.append(
            Change("checkpointing", "{row}.train.checkpointing=true", lambda w: replace(w, checkpointing=True))
        )
    if work.trained and found.stage != "pretrain" and not any(m.adapter or m.patterns for m in work.trained):
        sets = "{row}.adapter.rank=16"
        if any(m.shape.experts for m in work.trained):
            sets += " --set {row}.adapter.targets=attention"
        changes.append(Change("adapter", sets, _with_lora))
    if work.frozen and layout.frozen == "whole":
        if layout.ranks > 1:
            changes.append(_laid("frozen", "launch.frozen=sharded", frozen="sharded"))
        if not layout.on_cpu:
            changes.append(_laid("frozen", "launch.frozen=offloaded", frozen="offloaded"))
    if not work.trained:
        return changes
    if layout.ranks > 1:
        for stage in (2, 3):
            if layout.stage < stage:
                sets = f"launch.strategy=deepspeed --set launch.zero_stage={stage}"
                changes.append(_laid("zero", sets, strategy="deepspeed", stage=stage))
    if not layout.on_cpu and layout.offload != "all" and layout.strategy in ("single", "deepspeed"):
        for offload in ("optimizer", "all"):
            stage = 3 if offload == "all" else max(2, layout.stage)
            sets = f"launch.strategy=deepspeed --set launch.zero_stage={stage} --set launch.offload={offload}"
            if offload != layout.offload:
                changes.append(_laid("zero", sets, strategy="deepspeed", stage=stage, offload=offload))
    return changes


def _laid(kind: str, sets: str, **fields: object) -> Change:
    def make(work: Work) -> Work:
        layout: Layout = replace(work.layout, **fields)  # type: ignore[arg-type]
        return replace(work, layout=layout)

    return Change(kind, sets, make)


def _with_lora(work: Work) -> Work:
    """Adapters over what the row starts from, which its reference and others may hold as well."""
    lora = LoraSettings(targets="attention") if any(m.shape.experts for m in work.trained) else LoraSettings()
    policy = next((m.base for m in work.frozen if not m.scalar), None)
    made = tuple(replace(m, adapter=lora, base=policy or m.base) for m in work.trained)
    return replace(work, trained=made)
