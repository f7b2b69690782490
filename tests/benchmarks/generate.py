"""Sampling against transformers.generate: same weights, prompts, precision, threads and allocator; tokens a second.

    mixed B     prompts of 16 to 128 tokens, answers that stop by themselves after about 55 (at most 128), B rows at
                once. The rival gets its prompts sorted by length, B at a time, and waits for the longest answer of
                each batch; here a row whose answer has ended goes to the next prompt.
    equal B     B prompts of 64 tokens, 128 new tokens each, nobody waits for anybody
    K samples   ours alone: 8 samples of one prompt of 256 tokens, 32 new tokens each, against 8 prompts of the same
                tokens

Both sides draw from the whole softmax at temperature 1. Before anything is timed both decode greedily and must give
the same tokens; sampled answers differ, as the random numbers do, and a rate counts the tokens that were really drawn.
The rival runs at the fastest of: dynamic or static cache, plain SDPA or eager attention, its forward compiled or not,
products through MKL or oneDNN. A first round finds it, for each case anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Contestant, alternate, fastest, figures, require_same, say, wanted
from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths, save_models, shapes

OURS = "tests.benchmarks.generate_ours"
RIVAL = "tests.benchmarks.generate_rival"


@dataclass(frozen=True, kw_only=True)
class Task(Shape):
    """A turn answers all prompts once."""

    models: str = ""  # directory of `save_models`
    batch: int = 64  # rows at once
    prompts: int = 64
    shortest: int = 64  # tokens of a prompt
    longest: int = 64
    new: int = 128  # new tokens at most
    stops: bool = False
    samples: int = 1
    copies: bool = False  # one prompt for each sample, all with the same tokens
    cache: str = "dynamic"  # the rival's
    attention: str = "sdpa"
    compiled: bool = False
    products: str = "highest"  # or medium: float32 through oneDNN, the rival's; ours chooses by itself

    def prompt_ids(self) -> list[list[int]]:
        lengths = draw_lengths(self.shortest, self.longest, self.prompts, seed=1)
        ids = draw_ids(self.vocabulary, lengths, seed=2)
        return [list(p) for p in ids for _ in range(self.samples)] if self.copies else ids


CANDIDATES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "dynamic cache, oneDNN": {"products": "medium"},
    "dynamic cache, eager": {"attention": "eager"},
    "static cache": {"cache": "static"},
    "static cache, compiled": {"cache": "static", "compiled": True},
}


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    lines: list[dict[str, Any]] = []
    for name, shape in shapes(small).items():
        with tempfile.TemporaryDirectory() as folder:
            base = Task(**shape, models=folder, new=16 if small else 128)
            save_models(base, Path(folder))
            for label, task in _cases(base, small).items():
                lines += _against_transformers(f"{name}, {label}", task, small, repeats)
            lines += _against_copies(f"{name}, K samples", base, small, repeats)
    return lines


def _cases(base: Task, small: bool) -> dict[str, Task]:
    mixed = replace(base, shortest=16, longest=32 if small else 128, stops=True)
    sizes = (8,) if small else (1, 16, 64)
    found = {f"mixed {b}": replace(mixed, batch=b, prompts=max(8, 4 * b)) for b in sizes}
    return found if small else found | {f"equal {sizes[-1]}": replace(base, batch=sizes[-1], prompts=sizes[-1])}


def _against_transformers(case: str, task: Task, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    say(f"{case}: {repeats} repetitions of {task.prompts} prompts")
    chosen = dict(list(CANDIDATES.items())[: 1 if small else None])
    trial = replace(task, prompts=max(4, task.batch))
    best = fastest({name: replace(trial, **settings) for name, settings in chosen.items()}, RIVAL)
    contestants = [
        Contestant("ours", OURS, task),
        Contestant(f"transformers, {best}", RIVAL, replace(task, **chosen[best])),
        Contestant("transformers, default allocation", RIVAL, task, keep_freed=False),
    ]
    return _measure(case, task, contestants, repeats)


def _against_copies(case: str, base: Task, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    k = 4 if small else 8
    length = 64 if small else 256
    shared = replace(base, prompts=1, samples=k, batch=k, shortest=length, longest=length, new=8 if small else 32)
    copies = replace(shared, copies=True)
    say(f"{case}: {repeats} repetitions")
    contestants = [Contestant("ours", OURS, shared), Contestant(f"ours, {k} separate prompts", OURS, copies)]
    return _measure(case, shared, contestants, repeats)


def _measure(case: str, task: Task, contestants: list[Contestant], repeats: int) -> list[dict[str, Any]]:
    try:
        require_same(contestants, "greedy", 0.0)
        ceilings = alternate(contestants, repeats)
        lengths = {c.name: round(c.mean("tokens") / (task.prompts * task.samples), 1) for c in contestants}
        say(f"  tokens an answer: {lengths}")
        per_token = contestants[0].mean("operations") / contestants[0].mean("tokens")
        lines = figures("generate", case, contestants, ceilings, unit="tokens/s", operations=per_token)
        return [line | {"answer_tokens": lengths} for line in lines]
    finally:
        for contestant in contestants:
            contestant.close()
