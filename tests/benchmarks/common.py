"""What every benchmark needs: contestants in processes of their own, alternation, the ceiling, figures.

    named = {"batch 8": task, "batch 16": other}                        settings of the rival to choose among
    best = fastest(named, RIVAL)                                        the name of the quickest
    contestants = [Contestant("ours", OURS, task), Contestant(best, RIVAL, named[best])]
    require_same(contestants, "first_loss", 2e-5)                       they compute the same, or nothing is compared
    ceilings = alternate(contestants, repeats=5)

The machine is noisy, so contestants take turns, medians are quoted with the lowest and highest repetition,
and the rate of a plain matrix product is measured between the turns. Where other programs share the cores, a ratio of
wall times says little; `cpu_ratio` beside it compares processor time, which they disturb less (measure with
--threads 1 then: a thread that waits for another one counts as busy).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "@@ "
THREADS = int(os.environ.get("BENCH_THREADS", "2"))
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def wanted(case: str) -> bool:
    """Whether this case is to be measured (`--case`)."""
    return os.environ.get("BENCH_CASE", "") in case


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Contestant:
    """A process that gets ready, then runs one repetition for every `turn`.

    The module is started as `python -m MODULE JSON`; it answers with marked JSON lines (see `Stand`). Packages that
    lie in the directory `packages` come before the installed ones.
    """

    def __init__(
        self, name: str, module: str, task: Any, *, keep_freed: bool = True, packages: Path | None = None
    ) -> None:
        self.name = name
        self.turns: list[dict[str, Any]] = []
        threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
        if packages is not None:
            threads["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(task if isinstance(task, Mapping) else asdict(task))],
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

    def mean(self, key: str) -> float:
        return statistics.fmean(t[key] for t in self.turns)

    def where(self) -> dict[str, float]:
        """Shares of the time of all turns by phase, in percent, of the phases that the turns report."""
        totals: dict[str, float] = {}
        for turn in self.turns:
            for phase, seconds in turn.get("seconds", {}).items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        whole = sum(totals.values())
        return {phase: round(100 * seconds / whole, 1) for phase, seconds in totals.items()} if whole else {}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        errors = self.process.stderr.read() if self.process.stderr else ""
        raise RuntimeError(f"{self.name} ended early:\n{errors[-3000:]}")


@dataclass
class Measured:
    """Wall and processor seconds of what happened inside `Stand.measure`."""

    wall: float = 0.0
    cpu: float = 0.0

    def rates(self, count: float) -> dict[str, float]:
        return {"rate": count / self.wall, "cpu_rate": count / self.cpu, "peak_mb": peak_mb()}


class Stand:
    """The contestant's side: say what is ready, wait for turns, answer each with its figures."""

    @contextmanager
    def measure(self) -> Iterator[Measured]:
        found, wall, cpu = Measured(), time.perf_counter(), time.process_time()
        yield found
        found.wall, found.cpu = time.perf_counter() - wall, time.process_time() - cpu

    def answer(self, **figures: Any) -> None:
        print(MARK + json.dumps(figures), flush=True)

    def wait(self) -> bool:
        """False when there are no more turns."""
        return sys.stdin.readline().strip() == "go"


class Clock:
    """Seconds by phase of one turn: `with clock("generation"): ...`, then `clock.read()`, which starts anew."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def read(self, total: float) -> dict[str, float]:
        """What was measured, and as `rest` what is missing to the whole turn."""
        found, self.seconds = self.seconds, {}
        return found | {"rest": max(0.0, total - sum(found.values()))}


def fastest(named: Mapping[str, Any], module: str, *, packages: Path | None = None, key: str = "rate") -> str:
    """The name of the fastest of some settings, best of two turns each."""
    if len(named) == 1:
        return next(iter(named))
    rates = {}
    for name, task in named.items():
        contestant = Contestant(name, module, task, packages=packages)
        rates[name] = max(contestant.turn()[key] for _ in range(2))
        contestant.close()
        say(f"  {name}: {rates[name]:.4g}")
    return max(rates, key=lambda name: rates[name])


def require_same(contestants: Sequence[Contestant], key: str, tolerance: float) -> None:
    """Numbers (or lists of them) that the contestants found before their first turn agree; else the run ends."""
    found = {c.name: c.ready[key] for c in contestants if c.ready.get(key) is not None}
    listed = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    shown = {name: [round(float(v), 6) for v in values[:4]] for name, values in listed.items()}
    say(f"  {key}: " + "; ".join(f"{name} {values}" for name, values in shown.items()))
    first = next(iter(listed.values()))
    for name, values in listed.items():
        off = max((abs(a - b) for a, b in zip(first, values, strict=True)), default=0.0)
        if not off <= tolerance:
            sys.exit(f"the contestants do not compute the same: {key} of {name} is off by {off:.3g}: {shown}")


def alternate(contestants: Sequence[Contestant], repeats: int) -> list[dict[str, float]]:
    """`repeats` rounds in which everyone has a turn, each round starting with another; the ceilings."""
    ceilings = []
    for number in range(repeats):
        ceilings.append(matmul_rates())
        shift = number % len(contestants)
        for contestant in (*contestants[shift:], *contestants[:shift]):
            contestant.turn()
    return ceilings


def set_products(route: str) -> None:
    """Float32 products through MKL ("highest") or oneDNN ("medium"), as the project does: only where that is exact.

    On CPUs with bfloat16 units oneDNN uses these for "medium", which is another precision: there MKL computes for all.
    """
    import torch

    from pipeline.llama.arithmetic import medium_is_exact

    torch.set_float32_matmul_precision(route if medium_is_exact() else "highest")


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
        set_products(precision)
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


def matmul_rate(ceilings: Sequence[Mapping[str, float]], precision: str = "fp32") -> float:
    """Operations a second of the best product of this precision, over the whole run."""
    names = ("bf16",) if precision == "bf16" else ("mkl", "onednn")
    return max(c[name] for c in ceilings for name in names) * 1e9


def peak_mb() -> float:
    """Most memory that this process ever held, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class Figure:
    """One comparison. `ceiling_share` is our share of the measured matmul rate, so that `ceiling`, in the unit of
    `ours`, is what the matrix products alone would take. `where` is the time by phase in percent, ours and theirs.
    """

    bench: str
    case: str
    ours: float
    rival: float
    unit: str
    higher_is_better: bool = True
    ceiling_share: float | None = None
    peak_mb_ours: float | None = None
    peak_mb_rival: float | None = None
    where_ours: Mapping[str, float] = field(default_factory=dict)
    where_rival: Mapping[str, float] = field(default_factory=dict)
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
            "ceiling": _round(self.ours / self.ceiling_share) if self.ceiling_share else None,
            "ceiling_share": None if self.ceiling_share is None else round(self.ceiling_share, 3),
            "peak_mb_ours": _round(self.peak_mb_ours),
            "peak_mb_rival": _round(self.peak_mb_rival),
        }
        where = {"where_ours": dict(self.where_ours), "where_rival": dict(self.where_rival)}
        return rounded | {k: v for k, v in where.items() if v} | dict(self.more)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def figures(
    bench: str,
    case: str,
    contestants: Sequence[Contestant],
    ceilings: Sequence[Mapping[str, float]],
    *,
    unit: str,
    operations: float,
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """One line for each rival against the first contestant; `operations` are those of one `unit`."""
    ours, *rivals = contestants
    share = ours.median("rate") * operations / matmul_rate(ceilings, precision)
    matmul = {name: round(max(c[name] for c in ceilings), 1) for name in ceilings[0]}
    return [
        Figure(
            bench=bench,
            case=f"{case}: {rival.name}",
            ours=ours.median("rate"),
            rival=rival.median("rate"),
            unit=unit,
            ceiling_share=share,
            peak_mb_ours=ours.turns[-1]["peak_mb"],
            peak_mb_rival=rival.turns[-1]["peak_mb"],
            where_ours=ours.where(),
            where_rival=rival.where(),
            more={
                "cpu_ratio": round(ours.median("cpu_rate") / rival.median("cpu_rate"), 3),
                "spread_ours": [_round(v) for v in ours.spread("rate")],
                "spread_rival": [_round(v) for v in rival.spread("rate")],
                "matmul_gflops": matmul,
                "threads": THREADS,
            },
        ).line()
        for rival in rivals
    ]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The figures for people, and under them where the time goes."""
    columns = ("case", "ours", "rival", "ratio", "cpu_ratio", "unit", "ceiling", "ceiling_share", "peak_mb_ours")
    columns += ("peak_mb_rival",)
    rows = [columns, *(tuple("" if line.get(c) is None else str(line[c]) for c in columns) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    said = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for line in lines:
        for side in ("ours", "rival"):
            if phases := line.get(f"where_{side}"):
                said.append(f"{line['case']}, {side}: " + ", ".join(f"{k} {v:g} %" for k, v in phases.items()))
    return "\n".join(said)
