"""One rank of a scaling measurement: steps on one global batch, and what it took. scaling.py starts it.

torchrun --nproc_per_node N tests/benchmarks/scaling_rank.py OUT SHAPE_JSON LAUNCH_JSON
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

STEPS, WARM = 6, 2


def main(out: str, shape_text: str, launch_text: str) -> None:
    import torch

    from pipeline.data.forest import Segment
    from pipeline.flow import heap
    from pipeline.llama.open import open_trainable
    from pipeline.train.loop import Trainer
    from pipeline.train.objectives import next_token
    from pipeline.train.settings import TrainSettings
    from pipeline.train.strategy import build
    from tests.benchmarks.shapes import Shape, draw_ids, draw_lengths, policy_files, save_models

    heap.keep_freed()
    torch.set_num_threads(1)
    told = json.loads(shape_text)
    shape, records, longest = Shape(**told["shape"]), told["records"], told["longest"]
    with tempfile.TemporaryDirectory() as folder:
        save_models(
            shape, Path(folder)
        )  # before the ranks meet: transformers lets the first one alone write afterwards
        heap.give_back()  # else what the ranks take is what this model left
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again (proc(5))
        ranks = build(processes=int(os.environ.get("WORLD_SIZE", "1")), device="cpu", **json.loads(launch_text))
        before = memory("VmRSS")
        policy = open_trainable(policy_files(folder), None, 0)
    lengths = draw_lengths(longest // 4, longest, records, seed=1)
    ids = draw_ids(shape.vocabulary, lengths, seed=2)
    groups = [[Segment(i, weights=[0.0] + [1.0] * (len(i) - 1))] for i in ids]
    settings = TrainSettings(learning_rate=1e-4, token_budget=2 * longest, schedule="constant", warmup=0.0)
    trainer = Trainer(policy.module, next_token, settings, ranks, total=STEPS + WARM, seed=0)
    mine = trainer.share(groups)
    weights = {"tokens": float(sum(len(group[0].ids) - 1 for group in mine))}
    losses = []
    for step in range(WARM + STEPS):
        if step == WARM:
            ranks.barrier()
            begin = time.perf_counter()
        losses.append(trainer.step(mine, weights, groups[0])["loss"])
    ranks.barrier()
    seconds = time.perf_counter() - begin
    found = {"rate": STEPS * sum(lengths) / seconds, "mb": memory("VmHWM") - before, "losses": losses}
    Path(f"{out}.{ranks.rank}").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def memory(name: str) -> float:
    """MB that this process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # static destructors below DeepSpeed abort now and then at an ordinary end
