"""SFT against TRL's SFTTrainer: same records, weights, precision, threads and allocator; tokens a second.

Measured in bf16 (autocast over float32 weights, as the quickstart trains) and in fp32. The rival runs at its best
settings: rows padded (as they come, and sorted by length inside each step, which it does not do by itself) with
several micro-batch sizes, and packed in the padding-free way with a proof that nothing leaks between samples. A first
round picks the fastest of these; then they and ours take turns. Every token but a sample's first is trained, so nobody
gains by leaving positions out of the head.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.common import Contestant, Figure, alternate, say, wanted

OURS = "tests.benchmarks.sft_ours"
RIVAL = "tests.benchmarks.sft_rival"


@dataclass(frozen=True)
class Task:
    """Records of `shortest` to `longest` tokens, `batch` a step; a turn is `steps` optimiser steps."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    vocabulary: int = 4096
    shortest: int = 32
    longest: int = 256
    batch: int = 32
    steps: int = 2
    turns: int = 12
    token_budget: int = 2048  # tokens of a forward pass of ours: the fastest that also takes little memory
    micro: int = 8  # rows of a forward pass of the rival
    packed: int = 0  # length of the rival's packed rows, 0: padded
    ordered: bool = False  # records of a step sorted by length
    precision: str = "fp32"  # or bf16: autocast over float32 weights on both sides

    @property
    def intermediate(self) -> int:
        return self.hidden * 8 // 3 // 32 * 32

    def records(self) -> list[list[int]]:
        """Ids of all steps of all turns; the ids 0 to 2 are left to the tokenizer's own tokens."""
        import torch

        draw = torch.Generator().manual_seed(0)
        count = self.batch * self.steps * (self.turns + 1)
        lengths = torch.randint(self.shortest, self.longest + 1, (count,), generator=draw).tolist()
        made = [torch.randint(3, self.vocabulary, (n,), generator=draw).tolist() for n in lengths]
        if not self.ordered:
            return made
        batches = [made[i : i + self.batch] for i in range(0, count, self.batch)]
        return [r for b in batches for r in sorted(b, key=len, reverse=True)]

    def model(self) -> Any:
        """transformers' LLaMA with weights that depend on the seed alone."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=2048,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=False,
            )
        )

    def flops_per_token(self) -> float:
        """Forward and backward products: 6 a weight, and causal attention over its mean reach."""
        weights = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)
        weights += self.hidden * self.vocabulary
        lengths = [len(r) for r in self.records()]
        reach = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
        return 6.0 * weights + 12.0 * self.layers * self.hidden * reach


SMALL = {"hidden": 64, "layers": 2, "heads": 4, "vocabulary": 256, "longest": 96, "batch": 8, "steps": 1}


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    repeats = repeats or (2 if small else 5)
    return [line for precision in ("bf16", "fp32") for line in _run(precision, small, repeats)]


def _run(precision: str, small: bool, repeats: int) -> list[dict[str, Any]]:
    if not wanted(precision):
        return []
    shape = SMALL if small else {}
    base = Task(**shape, turns=repeats + 2, precision=precision)
    say(f"{precision}: {repeats} repetitions of {base.steps} steps of {base.batch} records each")
    chosen = [_best_padded(base, small), _best_packed(base, small)]
    contestants = [
        Contestant("ours", OURS, asdict(base)),
        *(Contestant(name, RIVAL, asdict(task)) for name, task in chosen),
        *(Contestant(f"{name}, default allocation", RIVAL, asdict(t), keep_freed=False) for name, t in chosen),
    ]
    try:
        _require_same_loss(contestants)
        ceilings = alternate(contestants, repeats)
        return _figures(base, contestants, ceilings)
    finally:
        for contestant in contestants:
            contestant.close()


def _best_padded(base: Task, small: bool) -> tuple[str, Task]:
    tried = [(True, 4), (True, 8)] + ([] if small else [(False, 8), (True, 16)])
    named = {
        f"padded{' sorted' if ordered else ''}, {micro} rows": _with(base, micro=micro, ordered=ordered)
        for ordered, micro in tried
    }
    return _fastest(named)


def _best_packed(base: Task, small: bool) -> tuple[str, Task]:
    tried = [(128, 1)] if small else [(256, 1), (512, 1), (1024, 1), (2048, 1)]
    named = {
        f"packed to {length}, {micro} row{'s' * (micro > 1)}": _with(base, micro=micro, packed=length)
        for length, micro in tried
    }
    return _fastest(named)


def _with(task: Task, **changes: Any) -> Task:
    return Task(**{**asdict(task), **changes})


def _fastest(named: dict[str, Task]) -> tuple[str, Task]:
    """The fastest of some settings of the rival, best of two turns each."""
    rates = {}
    for name, task in named.items():
        contestant = Contestant(name, RIVAL, asdict(_with(task, steps=1)))
        rates[name] = max(contestant.turn()["rate"] for _ in range(2))
        contestant.close()
        say(f"  {name}: {rates[name]:.0f} tokens/s")
    best = max(rates, key=lambda name: rates[name])
    return best, named[best]


def _require_same_loss(contestants: list[Contestant]) -> None:
    """Padded rows and our forests see the same batches: their first losses must agree."""
    losses = {c.name: c.ready["first_loss"] for c in contestants if c.ready.get("first_loss") is not None}
    say("  first loss: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    if max(losses.values()) - min(losses.values()) > 2e-5:
        sys.exit(f"the contestants do not compute the same: {losses}")


def _figures(task: Task, contestants: list[Contestant], ceilings: list[dict[str, float]]) -> list[dict[str, Any]]:
    ours, *rivals = contestants
    matmul = {name: round(max(c[name] for c in ceilings), 1) for name in ("mkl", "onednn", "bf16")}
    ceiling = max(matmul[name] for name in (("bf16",) if task.precision == "bf16" else ("mkl", "onednn"))) * 1e9
    share = ours.median("rate") * task.flops_per_token() / ceiling
    half = len(rivals) // 2
    groups = (("best", rivals[:half]), ("best at default allocation", rivals[half:]))
    picks = [(label, max(group, key=lambda c: c.median("rate"))) for label, group in groups]
    return [
        Figure(
            bench="sft",
            case=f"{task.precision}, {label}{rival.name}",
            ours=ours.median("rate"),
            rival=rival.median("rate"),
            unit="tokens/s",
            ceiling_share=share,
            peak_mb_ours=ours.turns[-1]["peak_mb"],
            peak_mb_rival=rival.turns[-1]["peak_mb"],
            more={
                "spread_ours": [round(v, 1) for v in ours.spread("rate")],
                "spread_rival": [round(v, 1) for v in rival.spread("rate")],
                "start_mb_ours": round(ours.ready["start_mb"], 1),
                "start_mb_rival": round(rival.ready["start_mb"], 1),
                "matmul_gflops": matmul,
            },
        ).line()
        for label, rival in [*((f"{label}: ", c) for label, c in picks), *(("", c) for c in rivals)]
    ]
