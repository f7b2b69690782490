"""PPO against TRL 1.12's PPOTrainer, the last that TRL had: same weights, prompts, updates; episodes a second.

A turn is one iteration: 64 prompts are answered once each with at most 128 tokens, scored by a reward model of the
policy's size, and trained on for 4 epochs in minibatches of 16, policy and a separate value model: 16 updates.

    equal       prompts of 64 tokens, 128 new tokens each: nothing is padded and nobody waits
    mixed       prompts of 16 to 64 tokens, answers that stop by themselves after about 55 (at most 128)
    one trunk   equal, but our values come from a head on the policy's trunk; the rival has no such setting

Before anything is timed both sides give log-probs, values and scores of the same answers, which must agree, and every
turn reports how many updates the optimiser really made. (With gradient_accumulation_steps above 1 TRL's PPO makes
fewer than it has minibatches; here it gets per_device_train_batch_size 64 and num_mini_batches 4, which rolls all 64
prompts out together and updates after each 16.)

The rival runs without checkpointing, saving, logging to anywhere or sample tables, with float32 products routed as
here: oneDNN outside of sampling, and inside it whichever of MKL and oneDNN is faster; the forward batch of its rollout
is chosen in a first round too. A last contestant runs at the default allocation and products.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Contestant, alternate, fastest, figures, require_same, say, wanted
from tests.benchmarks.rivals import trl_with_ppo
from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths, save_models, shapes

OURS = "tests.benchmarks.ppo_ours"
RIVAL = "tests.benchmarks.ppo_rival"


@dataclass(frozen=True, kw_only=True)
class Task(Shape):
    models: str = ""  # directory of `save_models`
    episodes: int = 64  # prompts of an iteration, one answer each
    minibatch: int = 16
    epochs: int = 4
    shortest: int = 64  # tokens of a prompt
    longest: int = 64
    new: int = 128  # new tokens at most
    stops: bool = False
    shared_trunk: bool = False
    turns: int = 8
    learning_rate: float = 1e-6  # so low that answers stay as long as they are on both sides
    token_budget: int = 4096  # of ours
    rollout: int = 64  # prompts that the rival samples and scores at once
    products: str = "routed"  # the rival's float32 products: routed, medium (all oneDNN) or highest (all MKL)

    @property
    def updates(self) -> int:
        """Updates of an iteration."""
        return self.epochs * -(-self.episodes // self.minibatch)

    def prompt_ids(self) -> list[list[int]]:
        return draw_ids(self.vocabulary, draw_lengths(self.shortest, self.longest, self.episodes, seed=1), seed=2)

    def probe(self) -> list[tuple[list[int], list[int]]]:
        """Prompts and answers that both sides evaluate before they start: all of one length, without a stop."""
        prompts = draw_ids(self.vocabulary, [12] * 4, seed=3)
        return [(p, ids[1:]) for p, ids in zip(prompts, draw_ids(self.vocabulary, [10] * 4, seed=4), strict=True)]

    def operations(self, prompts: list[int], answers: list[int]) -> float:
        """The least that an iteration needs: old log-probs come with the sampling; backward is twice forward."""
        total, trunks = 0.0, 1 if self.shared_trunk else 2
        for p, n in zip(prompts, answers, strict=True):
            read, head = self.reading(p, [n]), self.head(n)
            scored = trunks * read + (read + head)  # a value model, reward, reference
            total += self.sampling(p, [n]) + scored + self.epochs * 3 * (trunks * read + head)
        return total


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    lines: list[dict[str, Any]] = []
    for name, shape in shapes(small).items():
        with tempfile.TemporaryDirectory() as folder:
            base = Task(**shape, models=folder, turns=repeats + 2)
            if small:
                base = replace(base, episodes=16, minibatch=8, epochs=2, shortest=16, longest=16, new=16)
            save_models(base, Path(folder))
            for label, task in _cases(base, small).items():
                lines += _measure(f"{name}, {label}", task, small, repeats)
    return lines


def _cases(base: Task, small: bool) -> dict[str, Task]:
    mixed = replace(base, shortest=base.longest // 4, stops=True)
    one = replace(base, shared_trunk=True)
    return {"mixed": mixed} if small else {"equal": base, "mixed": mixed, "one trunk": one}


def _measure(case: str, task: Task, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    say(f"{case}: {repeats} repetitions of {task.episodes} episodes and {task.updates} updates")
    trl = trl_with_ppo()
    candidates: dict[str, dict[str, Any]] = {
        "rollouts of 64": {},
        "rollouts of 32": {"rollout": 32},
        "rollouts of 64, oneDNN": {"products": "medium"},
    }
    candidates = {"": {}} if small or task.shared_trunk else candidates  # one trunk: the same rival as equal
    trials = {name: replace(task, turns=3, epochs=1, **settings) for name, settings in candidates.items()}
    best = fastest(trials, RIVAL, packages=trl)
    default = replace(task, products="highest")
    contestants = [
        Contestant("ours", OURS, task),
        Contestant(f"TRL 1.12, {best}".removesuffix(", "), RIVAL, replace(task, **candidates[best]), packages=trl),
        Contestant("TRL 1.12, default allocation and products", RIVAL, default, keep_freed=False, packages=trl),
    ]
    try:
        for what in ("logprobs", "scores") if task.shared_trunk else ("logprobs", "values", "scores"):
            require_same(contestants, what, 2e-5)
        ceilings = alternate(contestants, repeats)
        _require_same_work(task, contestants)
        per_episode = contestants[0].mean("operations") / task.episodes
        lines = figures("ppo", case, contestants, ceilings, unit="episodes/s", operations=per_episode)
        lengths = {c.name: round(c.mean("tokens") / task.episodes, 1) for c in contestants}
        return [line | {"answer_tokens": lengths} for line in lines]
    finally:
        for contestant in contestants:
            contestant.close()


def _require_same_work(task: Task, contestants: list[Contestant]) -> None:
    """All made the same updates; without stops they also drew the same number of tokens."""
    for c in contestants:
        updates = {turn["updates"] for turn in c.turns}
        if updates != {task.updates}:
            sys.exit(f"{c.name} made {sorted(updates)} updates an iteration, not {task.updates}")
        tokens = {turn["tokens"] for turn in c.turns}
        if not task.stops and tokens != {task.episodes * task.new}:
            sys.exit(f"{c.name} drew {sorted(tokens)} tokens, not {task.episodes * task.new}")
    say(f"  tokens an answer: { {c.name: round(c.mean('tokens') / task.episodes, 1) for c in contestants} }")
