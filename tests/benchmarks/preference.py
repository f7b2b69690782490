"""What the reward and DPO benchmarks share: records, cases, and how they are measured against TRL's trainers.

Both sides train on the same records in the same order, all weights, AdamW, gradients clipped to 1; a turn is `steps`
updates of `batch` comparisons. Their first losses must agree. The rival is the installed TRL with its own collators,
which pad; it runs without checkpointing, saving or logging, at the fastest of several micro-batch sizes, with the
records of a step also sorted by length (which it does not do by itself), float32 products through oneDNN as here or
through MKL: oneDNN writes machine code for every new shape of a product, and padded rows have many. A last contestant
runs at the default allocation and products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.common import Contestant, alternate, fastest, figures, require_same, say, wanted
from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths

OURS = "tests.benchmarks.preference_ours"
RIVAL = "tests.benchmarks.preference_rival"
ROUTES = {"MKL": "highest", "oneDNN": "medium"}
Record = tuple[list[int], list[list[int]]]  # a prompt and its answers, the best first


@dataclass(frozen=True, kw_only=True)
class Task(Shape):
    kind: str = "reward"  # or dpo
    models: str = ""  # directory of `save_models`
    shortest: int = 32  # tokens of a prompt
    longest: int = 128
    share: float = 0.5  # tokens of an answer for each token of its prompt is (1 - share) / share
    spread: float = 0.5  # answers are up to this share shorter or longer than that
    answers: int = 2
    batch: int = 16  # comparisons an update
    steps: int = 2
    turns: int = 8
    token_budget: int = 2048  # tokens of a forward pass of ours
    micro: int = 8  # pairs of a forward pass of the rival
    ordered: bool = False  # the rival's records of a step sorted by length
    products: str = "medium"  # the rival's float32 products: medium (oneDNN) or highest (MKL)

    @property
    def pairs_each(self) -> int:
        return self.answers * (self.answers - 1) // 2

    def records(self) -> list[Record]:
        """Comparisons of all steps of all turns."""
        count = self.batch * self.steps * (self.turns + 1)
        lengths = draw_lengths(self.shortest, self.longest, count, seed=1)
        prompts = draw_ids(self.vocabulary, lengths, seed=2)
        parts = draw_lengths(-1000, 1000, count * self.answers, seed=3)
        wanted = [
            max(2, round(lengths[i // self.answers] * (1 - self.share) / self.share * (1 + self.spread * x / 1000)))
            for i, x in enumerate(parts)
        ]
        texts = [ids[1:] for ids in draw_ids(self.vocabulary, [n + 1 for n in wanted], seed=4)]
        made = [(p, texts[i * self.answers : (i + 1) * self.answers]) for i, p in enumerate(prompts)]
        if not self.ordered:
            return made
        steps = [made[i : i + self.batch] for i in range(0, count, self.batch)]
        return [r for step in steps for r in sorted(step, key=lambda r: -len(r[0]) - max(map(len, r[1])))]

    def operations(self) -> float:
        """The least that a comparison needs on average: forward and backward, its prompt computed once."""
        records = self.records()
        total = 0.0
        for prompt, answers in records:
            lengths = [len(a) for a in answers]
            total += 3 * self.reading(len(prompt), lengths)
            total += 3 * self.head(sum(lengths)) if self.kind == "dpo" else 0.0
        return total / len(records)


def smoke(task: Task) -> Task:
    return replace(task, shortest=task.shortest // 4, longest=task.longest // 4, batch=4, steps=1, micro=4)


def measure(bench: str, case: str, task: Task, rival: str, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    say(f"{bench}, {case}: {repeats} repetitions of {task.steps} steps of {task.batch} comparisons")
    whole = task.batch * task.pairs_each
    sizes = [(whole, False), (16, True), (8, True), (4, True)]
    named = {
        f"{rows} pairs a pass{', sorted' * ordered}, {route}": replace(task, micro=rows, ordered=ordered, products=p)
        for rows, ordered in sizes[: 1 if small else None]
        for route, p in list(ROUTES.items())[: 1 if small else None]
        if rows < whole or not ordered
    }
    best = fastest({name: replace(t, turns=3, steps=1) for name, t in named.items()}, RIVAL)
    default = replace(named[best], products="highest")
    contestants = [
        Contestant("ours", OURS, task),
        Contestant(f"{rival}, {best}", RIVAL, named[best]),
        Contestant(f"{rival}, default allocation and products", RIVAL, default, keep_freed=False),
    ]
    try:
        require_same(contestants, "first_loss", 2e-5)
        ceilings = alternate(contestants, repeats)
        return figures(bench, case, contestants, ceilings, unit="comparisons/s", operations=task.operations())
    finally:
        for contestant in contestants:
            contestant.close()
