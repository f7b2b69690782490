"""The core against transformers' LlamaForCausalLM: a training step on the same weights and tokens; tokens a second.

A step is forward, mean loss over all tokens but each row's first, backward, clipping, AdamW (fused on both sides), in
fp32 and in bf16 (autocast over float32 weights). Ours is the project's own loop on forests. The rival is transformers'
model with SDPA in a bare loop, without anything that a trainer would add: rows padded on the right to the longest of a
micro-batch, as they come or sorted by length within a step, micro-batches of several sizes, float32 products through
MKL or oneDNN. A first round picks its fastest setting; another contestant is the fastest of those that do not sort.

    equal     rows of one length: nothing is padded
    spread    lengths that a log-normal draws, as dialogues have them: half of them below 100 tokens, some of 512
    vocabulary    128,256 words on a tiny trunk: what the head takes, ours in chunks; the peaks are what counts

The losses of the first step must agree before anything is timed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.common import (
    THREADS,
    Contestant,
    Stand,
    alternate,
    fastest,
    figures,
    require_same,
    say,
    set_products,
    wanted,
)
from tests.benchmarks.shapes import Shape, draw_ids, pairs

HERE = "tests.benchmarks.core"
SHAPES = {
    "hidden 64": {"hidden": 64, "layers": 5, "vocabulary": 512},
    "hidden 256": {"hidden": 256, "layers": 6, "vocabulary": 4096},
    "hidden 512": {"hidden": 512, "layers": 8, "vocabulary": 4096},
}


@dataclass(frozen=True, kw_only=True)
class Task(Shape):
    side: str = "ours"
    precision: str = "fp32"  # or bf16
    length: int = 128  # tokens of a row where all are alike
    spread: bool = False
    rows: int = 32  # of a step
    steps: int = 2  # of a turn
    token_budget: int = 4096  # of a forward pass of ours
    micro: int = 8  # rows of a forward pass of the rival
    ordered: bool = False  # rows of a step sorted by length
    products: str = "routed"  # the rival's float32 products: routed (oneDNN) or highest (MKL)

    def lengths(self) -> list[int]:
        if not self.spread:
            return [self.length] * self.rows
        import torch

        drawn = torch.exp(torch.randn(self.rows, generator=torch.Generator().manual_seed(1)) * 0.9 + 4.5)
        return [int(n) for n in drawn.clamp(16, 512)]

    def records(self) -> list[list[int]]:
        return draw_ids(self.vocabulary, self.lengths(), seed=2)

    def operations(self) -> float:
        """Of a step, a token: forward and twice that backward; every token but a row's first is predicted."""
        lengths = self.lengths()
        forward = sum(self.trunk(n, pairs(0, n)) + self.head(n - 1) for n in lengths)
        return 3.0 * forward / sum(lengths)

    def model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**self.config()))


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    lines: list[dict[str, Any]] = []
    for shape, sizes in list(SHAPES.items())[: 1 if small else None]:
        for precision in ("fp32", "bf16"):
            for lengths in ("equal", "spread"):
                task = Task(**sizes, precision=precision, spread=lengths == "spread")
                task = replace(task, rows=8, steps=1) if small else task
                lines += _measure(f"{shape}, {precision}, {lengths}", task, repeats)
    wide = Task(hidden=64, layers=2, vocabulary=128_256, rows=4 if small else 16, steps=1)
    return lines + _measure("vocabulary 128,256", wide, repeats)


def _measure(case: str, task: Task, repeats: int) -> list[dict[str, Any]]:
    if not wanted(case):
        return []
    say(f"{case}: {repeats} repetitions of {task.steps} steps of {task.rows} rows, {sum(task.lengths())} tokens")
    rival = replace(task, side="transformers", products="routed" if task.precision == "fp32" else "highest")
    named = {
        f"{micro} rows{', sorted' * ordered}": replace(rival, micro=micro, ordered=ordered)
        for micro in (4, 8, 16)
        for ordered in ((False, True) if task.spread else (False,))
        if micro <= task.rows
    }
    if task.precision == "fp32":
        named |= {f"{name}, MKL": replace(t, products="highest") for name, t in named.items() if t.micro == 8}
    best = fastest(named, HERE)
    chosen = [best]
    if named[best].ordered:
        chosen.append(fastest({name: t for name, t in named.items() if not t.ordered}, HERE))
    contestants = [
        Contestant("ours", HERE, task),
        *(Contestant(f"transformers, {name}", HERE, named[name]) for name in chosen),
    ]
    try:
        require_same(contestants, "loss", 2e-5 if task.precision == "fp32" else 2e-2)
        ceilings = alternate(contestants, repeats)
        return figures(
            "core",
            case,
            contestants,
            ceilings,
            unit="tokens/s",
            operations=task.operations(),
            precision=task.precision,
        )
    finally:
        for contestant in contestants:
            contestant.close()


def ours(task: Task) -> Any:
    """A function that makes one step and gives its loss."""
    from pipeline.data.forest import Group, Segment
    from pipeline.flow import heap
    from pipeline.llama.heads import PolicyModel
    from pipeline.llama.modeling import LlamaForCausalLM
    from pipeline.train.batches import weigh_tokens
    from pipeline.train.loop import Trainer
    from pipeline.train.objectives import next_token
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build

    heap.keep_freed()  # as every worker of the project does
    source = task.model()
    model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.state_dict())
    del source
    groups: list[Group] = [[Segment(ids, weights=[0.0] + [1.0] * (len(ids) - 1))] for ids in task.records()]
    settings = TrainSettings(
        learning_rate=1e-4,
        schedule="constant",
        warmup=0.0,
        token_budget=task.token_budget,
        precision="bf16" if task.precision == "bf16" else "fp32",
    )
    trainer = Trainer(PolicyModel(model), next_token, settings, build(device="cpu"), total=10_000, seed=0)
    weights = weigh_tokens(groups)
    return lambda: trainer.step(groups, weights)["loss"]


def rival(task: Task) -> Any:
    """The same of transformers."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    if task.products == "routed":
        set_products("medium")
    model = task.model()
    model.set_attn_implementation("sdpa")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    records = sorted(task.records(), key=len, reverse=True) if task.ordered else task.records()
    trained = sum(len(r) - 1 for r in records)
    micros = []
    for at in range(0, len(records), task.micro):
        rows = [torch.tensor(r) for r in records[at : at + task.micro]]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        whole = bool(mask.all())  # without a mask SDPA knows by itself that the rows are causal: faster
        micros.append((ids, None if whole else mask, ids.masked_fill(mask == 0, -100)))

    def step() -> float:
        total = 0.0
        for ids, mask, labels in micros:
            with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
                loss = model(
                    input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=trained, use_cache=False
                ).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    return step


def main(task: Task) -> None:
    import torch

    torch.set_num_threads(THREADS)
    stand = Stand()
    step = (ours if task.side == "ours" else rival)(task)
    loss = step()
    step()
    stand.answer(loss=loss)
    tokens = sum(task.lengths())
    while stand.wait():
        with stand.measure() as spent:
            for _ in range(task.steps):
                step()
        stand.answer(**spent.rates(task.steps * tokens))


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
