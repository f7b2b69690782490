"""Several processes against one: tokens a second of all, and the peak memory of a rank above that before the model was
made. The same global batch, one thread a process, every way to share the work in turns. All must give the losses of one
process. On fewer cores than processes the rate says what sharing costs, not what it gains.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Figure, say, wanted
from tests.benchmarks.shapes import SMOKE, shapes

SCRIPT = Path(__file__).with_name("scaling_rank.py")
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero 1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero 2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero 3": {"strategy": "deepspeed", "zero_stage": 3},
    "zero 3, offload": {"strategy": "deepspeed", "zero_stage": 3, "offload": "all"},
}


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    lines = []
    for name, told in _sizes(small).items():
        cases = [(1, "one process", {})]
        cases += [(n, way, launch) for n in ((2,) if small else (2, 4)) for way, launch in WAYS.items()]
        cases = [c for c in cases if c[0] == 1 or wanted(f"{name}, {c[0]} processes, {c[1]}")]
        if len(cases) > 1:
            lines += _measure(name, told, cases, repeats or (1 if small else 2))
    return lines


def _sizes(small: bool) -> dict[str, dict[str, Any]]:
    """Shapes with the number and length of a batch's records; the last is large enough for its states to weigh more
    than buffers do (98 million parameters, 1.6 GB in one process)."""
    if small:
        return {"smoke": {"shape": SMOKE, "records": 8, "longest": 32}}
    sizes = {name: {"shape": shape, "records": 32, "longest": 256} for name, shape in shapes(small).items()}
    large = {"hidden": 1024, "layers": 8, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
    return sizes | {"hidden 1024": {"shape": large, "records": 8, "longest": 64}}


def _measure(name: str, told: dict[str, Any], cases: list[Any], repeats: int) -> list[dict[str, Any]]:
    found: dict[tuple[int, str], list[dict[str, float]]] = {case[:2]: [] for case in cases}
    expected: list[float] = []
    for repeat in range(repeats):
        for processes, way, launch in cases:
            ranks = _start(processes, told, launch)
            expected = expected or ranks[0]["losses"]
            apart = max(abs(a / b - 1) for rank in ranks for a, b in zip(rank["losses"], expected, strict=True))
            if apart > 1e-5:
                raise SystemExit(f"{name}, {processes} processes, {way}: losses differ by {apart:.1e} from one process")
            figures = {"rate": min(r["rate"] for r in ranks), "mb": max(r["mb"] for r in ranks)}
            found[processes, way].append(figures)
            say(f"{name}, {processes} x {way}, {repeat + 1} of {repeats}: {figures}")
    median = lambda key, what: statistics.median(one[what] for one in found[key])
    one = (1, "one process")
    return [
        Figure(
            "scaling",
            f"{name}, {key[0]} processes, {key[1]}",
            median(key, "rate"),
            median(one, "rate"),
            "tokens/s",
            peak_mb_ours=median(key, "mb"),
            peak_mb_rival=median(one, "mb"),
        ).line()
        for key in found
        if key != one
    ]


def _start(processes: int, told: dict[str, Any], launch: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank"
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if launch else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [sys.executable, *start, str(SCRIPT), str(out), json.dumps(told), json.dumps(launch)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise SystemExit(f"{processes} processes, {launch}: {done.stderr[-2000:]}")
        return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]
