"""What saving costs: `ours` with a checkpoint every so many steps, `rival` without, at the default interval and at 10.

One process, both in turns of 100 steps on the same batches. At the default interval the true difference drowns in
the noise of a shared machine, so beside the ratio stands `more`: the time that a save keeps the loop waiting and the
processor time of its thread, as shares of the steps between two saves; the rate at which a checkpoint is hashed beside
that of plain reading; and how much memory grows from the 100th step to the last.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.common import THREADS, Figure, say, wanted
from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths, policy_files, save_models, shapes

BATCH, TURN = 16, 100


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    lines = []
    for name, shape in shapes(small).items():
        for every in (TURN, 10):
            if wanted(case := f"{name}, every {every} steps"):
                lines.append(_measure(case, Shape(**shape), every, small, repeats or (2 if small else 5)))
    return lines


def _measure(case: str, shape: Shape, every: int, small: bool, repeats: int) -> dict[str, Any]:
    import torch

    from pipeline.data.forest import Segment
    from pipeline.flow import heap
    from pipeline.llama.open import open_trainable
    from pipeline.train import checkpoints
    from pipeline.train.loop import Trainer
    from pipeline.train.objectives import next_token
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build

    say(f"{case}: {repeats} repetitions of {TURN} steps of {BATCH} records")
    heap.keep_freed()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        save_models(shape, Path(folder))
        policy = open_trainable(policy_files(folder), None, 0)
        ids = draw_ids(shape.vocabulary, draw_lengths(8 if small else 32, 32 if small else 128, BATCH, seed=1), seed=2)
        groups = [[Segment(i, weights=[0.0] + [1.0] * (len(i) - 1))] for i in ids]
        weights = {"tokens": float(sum(len(i) - 1 for i in ids))}
        ranks = build(device="cpu")
        trainer = Trainer(policy.module, next_token, TrainSettings(learning_rate=1e-5), ranks, total=10**6, seed=0)
        kept = checkpoints.Checkpoints(Path(folder) / "checkpoints", "0" * 64, ranks)
        waits: list[float] = []
        written: list[float] = []
        write = kept._write

        def timed(*arguments: Any) -> None:
            begin = time.thread_time()
            write(*arguments)
            written.append(time.thread_time() - begin)

        kept._write = timed  # type: ignore[method-assign]

        def turn(saving: bool) -> float:
            begin = time.perf_counter()
            for _ in range(TURN):
                trainer.step(groups, weights)
                if saving and trainer.done % every == 0:
                    at = time.perf_counter()
                    kept.save(trainer.done, trainer.state(), {})
                    waits.append(time.perf_counter() - at)
            kept.finish()
            return time.perf_counter() - begin

        turn(True)
        waits.clear(), written.clear()
        before, with_saves, without = _resident_mb(), [], []
        for _ in range(repeats):
            with_saves.append(turn(True))
            without.append(turn(False))
        after = _resident_mb()
        step = statistics.median(without) / TURN
        reading, hashing = _rates(next(kept.directory.glob("step-*/tensors.safetensors")))
        waited, wrote = statistics.median(waits), statistics.median(written)
        more = {
            "waiting_share": round(waited / (every * step), 5),
            "writing_share": round(wrote / (every * step), 5),
            "waiting_in_steps": round(waited / step, 3),
            "hash_mb_s": round(hashing),
            "read_mb_s": round(reading),
            "memory_growth": round(after / before - 1, 4),
            "steps": 2 * repeats * TURN,
        }
        say(f"  {more}")
        ours, rival = (TURN / statistics.median(seconds) for seconds in (with_saves, without))
        return Figure("safety", case, ours, rival, "steps/s", more=more).line()


def _rates(path: Path) -> tuple[float, float]:
    """MB a second of reading a file that is in the page cache, and of reading and hashing it."""
    size, found = path.stat().st_size / 1e6, []
    for act in (lambda data: None, lambda data: hashlib.sha256(data)):
        begin = time.perf_counter()
        for _ in range(5):
            act(path.read_bytes())
        found.append(5 * size / (time.perf_counter() - begin))
    return found[0], found[1]


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
