"""A few steps of SFT in one way, for memory.py, which calls this in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (code, which is not what is to be measured)
import torch

import pipeline.llama.quantised  # noqa: F401
from pipeline.data.forest import Segment
from pipeline.llama.open import open_trainable
from pipeline.train.loop import Trainer
from pipeline.train.memory import trainable
from pipeline.train.objectives import next_token
from pipeline.train.strategy import build
from stages.sft import Sft
from tests.benchmarks.common import THREADS
from tests.benchmarks.scaling_rank import memory
from tests.benchmarks.shapes import Shape, draw_ids, policy_files, save_models

STEPS = 2  # and one before them


def save(shapes: dict[str, dict[str, int]], folder: str) -> None:
    for name, shape in shapes.items():
        save_models(Shape(**shape), Path(folder) / name)


def measure(told: dict[str, Any], folder: str) -> dict[str, float]:
    """Peak memory of training above that before the model was opened, seconds of a step, the first loss, and
    what is trained."""
    torch.set_num_threads(THREADS)
    _train(told, f"{folder}/warm", told["warm"])  # code, and what is allocated once, is nobody's
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what follows would find room there
    before = memory("VmRSS")
    trainer, losses, seconds = _train(told, f"{folder}/model", told["shape"])
    return {
        "mb": memory("VmHWM") - before,
        "seconds": statistics.median(seconds[1:]),
        "loss": round(losses[0], 5),
        "trained": trainable(trainer.module),
    }


def _train(told: dict[str, Any], folder: str, shape: dict[str, int]) -> tuple[Trainer, list[float], list[float]]:
    lengths = [told["length"]] * told["records"]
    train = {"learning_rate": 1e-4, "token_budget": sum(lengths), "schedule": "constant", "warmup": 0.0}
    config = Sft.Config.model_validate({"adapter": told.get("adapter"), "train": train | told.get("train", {})})
    policy = open_trainable(policy_files(folder), config.adapter, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    ids = draw_ids(shape["vocabulary"], lengths, seed=2)
    groups = [[Segment(i, weights=[0.0] + [1.0] * (len(i) - 1))] for i in ids]
    trainer = Trainer(policy.module, next_token, config.train, build(device="cpu"), total=STEPS + 1, seed=0)
    weights = {"tokens": float(sum(lengths) - len(lengths))}
    losses, seconds = [], []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        losses.append(trainer.step(groups, weights)["loss"])
        seconds.append(time.perf_counter() - begin)
    return trainer, losses, seconds
