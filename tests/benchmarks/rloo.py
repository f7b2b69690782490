"""RLOO with K = 8 against TRL's RLOOTrainer: same weights, prompts, updates; completions a second.

A turn is one iteration: 8 prompts of 16 to 64 tokens get 8 answers each, which stop by themselves after about 55
tokens (at most 128); they are scored by a reward model of the policy's size and trained on once, in two updates of 32
answers. There is no value model. The penalty for leaving the reference is taken off the reward.

The rival is the installed TRL. It runs without checkpointing, saving or logging, float32 products routed as in
ppo.py; the rows of its forward passes without gradient are those of its minibatch. Its reward model is a function that
takes ids as they are, so that no text is tokenised again. A last contestant runs at the default allocation and
products.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Contestant, alternate, fastest, figures, require_same, say, wanted
from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths, save_models, shapes

OURS = "tests.benchmarks.rloo_ours"
RIVAL = "tests.benchmarks.rloo_rival"


@dataclass(frozen=True, kw_only=True)
class Task(Shape):
    models: str = ""  # directory of `save_models`
    prompts: int = 8  # of an iteration
    samples: int = 8  # answers to each
    minibatch: int = 32  # answers an update
    shortest: int = 16  # tokens of a prompt
    longest: int = 64
    new: int = 128  # new tokens at most
    stops: bool = True
    turns: int = 8
    learning_rate: float = 1e-6  # so low that answers stay as long as they are on both sides
    token_budget: int = 4096  # of ours
    products: str = "routed"  # the rival's float32 products: routed, medium (all oneDNN) or highest (all MKL)

    @property
    def completions(self) -> int:
        return self.prompts * self.samples

    @property
    def updates(self) -> int:
        return -(-self.completions // self.minibatch)

    def prompt_ids(self) -> list[list[int]]:
        return draw_ids(self.vocabulary, draw_lengths(self.shortest, self.longest, self.prompts, seed=1), seed=2)

    def probe(self) -> list[tuple[list[int], list[int]]]:
        """Prompts and answers that both sides evaluate before they start: all of one length, without a stop."""
        prompts = draw_ids(self.vocabulary, [12] * 4, seed=3)
        return [(p, ids[1:]) for p, ids in zip(prompts, draw_ids(self.vocabulary, [10] * 4, seed=4), strict=True)]

    def operations(self, prompts: list[int], answers: list[list[int]]) -> float:
        """The least that an iteration needs: old log-probs come with the sampling; a prompt is read once for all."""
        total = 0.0
        for p, own in zip(prompts, answers, strict=True):
            read, head = self.reading(p, own), self.head(sum(own))
            total += self.sampling(p, own) + (2 * read + head) + 3 * (read + head)
        return total


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    lines: list[dict[str, Any]] = []
    for name, shape in shapes(small).items():
        with tempfile.TemporaryDirectory() as folder:
            task = Task(**shape, models=folder, turns=repeats + 2)
            if small:
                task = replace(task, prompts=2, minibatch=8, shortest=8, longest=16, new=16)
            save_models(task, Path(folder))
            lines += _measure(f"{name}, K = {task.samples}", task, small, repeats)
    return lines


def _measure(case: str, task: Task, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    say(f"{case}: {repeats} repetitions of {task.completions} answers and {task.updates} updates")
    ours = Contestant("ours", OURS, task)  # first: where it cannot run, nothing else needs to
    contestants = [ours]
    try:
        routes = ("routed",) if small else ("routed", "medium")
        trials = {f"products {name}": replace(task, turns=3, products=name) for name in routes}
        best = fastest(trials, RIVAL)
        chosen = replace(trials[best], turns=task.turns)
        default = replace(task, products="highest")
        contestants += [
            Contestant(f"RLOOTrainer, {best}", RIVAL, chosen),
            Contestant("RLOOTrainer, default allocation and products", RIVAL, default, keep_freed=False),
        ]
        require_same(contestants, "logprobs", 2e-5)
        require_same(contestants, "scores", 2e-5)
        ceilings = alternate(contestants, repeats)
        for c in contestants:
            updates = {turn["updates"] for turn in c.turns}
            if updates != {task.updates}:
                sys.exit(f"{c.name} made {sorted(updates)} updates an iteration, not {task.updates}")
        lengths = {c.name: round(c.mean("tokens") / task.completions, 1) for c in contestants}
        say(f"  tokens an answer: {lengths}")
        each = ours.mean("operations") / task.completions
        lines = figures("rloo", case, contestants, ceilings, unit="completions/s", operations=each)
        return [line | {"answer_tokens": lengths} for line in lines]
    finally:
        for contestant in contestants:
            contestant.close()
