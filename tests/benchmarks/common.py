"""What every benchmark needs: contestants in processes of their own, alternation, the ceiling, figures.

The machine is noisy, so contestants take turns, medians are quoted with the lowest and highest repetition,
and the rate of a plain matrix product is measured between the turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "@@ "
THREADS = 2
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Contestant:
    """A process that gets ready, then runs one repetition for every `turn`.

    The module is started as `python -m MODULE JSON`; it answers with marked JSON lines (see `Stand`).
    """

    def __init__(self, name: str, module: str, task: Mapping[str, Any], *, keep_freed: bool = True) -> None:
        self.name = name
        self.turns: list[dict[str, Any]] = []
        threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("BENCH_DEBUG") else None,
            text=True,
            env=clean | QUIET | threads | (KEEP_FREED if keep_freed else {}),
        )
        self.ready = self._answer()

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._answer())
        return self.turns[-1]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()

    def median(self, key: str) -> float:
        return statistics.median(t[key] for t in self.turns)

    def spread(self, key: str) -> tuple[float, float]:
        return min(t[key] for t in self.turns), max(t[key] for t in self.turns)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        errors = self.process.stderr.read() if self.process.stderr else ""
        raise RuntimeError(f"{self.name} ended early:\n{errors[-3000:]}")


class Stand:
    """The contestant's side: say what is ready, wait for turns, answer each with its figures."""

    def answer(self, **figures: Any) -> None:
        print(MARK + json.dumps(figures), flush=True)

    def wait(self) -> bool:
        """False when there are no more turns."""
        return sys.stdin.readline().strip() == "go"


def alternate(contestants: Sequence[Contestant], repeats: int) -> list[dict[str, float]]:
    """`repeats` rounds in which everyone has a turn, each round starting with another; the ceilings."""
    ceilings = []
    for number in range(repeats):
        ceilings.append(matmul_rates())
        shift = number % len(contestants)
        for contestant in (*contestants[shift:], *contestants[:shift]):
            contestant.turn()
    return ceilings


def matmul_rates(size: int = 1024, seconds: float = 0.3) -> dict[str, float]:
    """GFLOP/s of a product on this machine: float32 through PyTorch's two libraries, and bfloat16."""
    import torch

    torch.set_num_threads(THREADS)
    rates = {}
    for name, precision, dtype in (
        ("mkl", "highest", torch.float32),
        ("onednn", "medium", torch.float32),
        ("bf16", "highest", torch.bfloat16),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        a @ b
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        rates[name] = 2 * size**3 / best / 1e9
    torch.set_float32_matmul_precision("highest")
    return rates


def peak_mb() -> float:
    """Most memory that this process ever held, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class Figure:
    """One comparison. `ceiling_share` is our share of the measured matmul rate."""

    bench: str
    case: str
    ours: float
    rival: float
    unit: str
    higher_is_better: bool = True
    ceiling_share: float | None = None
    peak_mb_ours: float | None = None
    peak_mb_rival: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        ratio = self.ours / self.rival if self.higher_is_better else self.rival / self.ours
        rounded = {
            "bench": self.bench,
            "case": self.case,
            "ours": _round(self.ours),
            "rival": _round(self.rival),
            "ratio": round(ratio, 3),
            "unit": self.unit,
            "ceiling_share": None if self.ceiling_share is None else round(self.ceiling_share, 3),
            "peak_mb_ours": _round(self.peak_mb_ours),
            "peak_mb_rival": _round(self.peak_mb_rival),
        }
        return rounded | dict(self.more)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The figures for people."""
    columns = ("case", "ours", "rival", "ratio", "unit", "ceiling_share", "peak_mb_ours", "peak_mb_rival")
    rows = [columns, *(tuple("" if line[c] is None else str(line[c]) for c in columns) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
