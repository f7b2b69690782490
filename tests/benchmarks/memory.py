"""What every saver of memory saves, and what it costs: peak memory and seconds of a step of the same SFT on one model.

`ours` is the most that a process held while it trained above what it held before the model was opened, `rival` the same
of the plain way: all weights in float32, AdamW, one pass a step. Each way runs in a process of its own; losses of the
first step say how far what is computed is the same.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from tests.benchmarks.common import Figure, say, wanted

SHAPE = {"hidden": 384, "layers": 8, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
SMOKE = {"hidden": 192, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 128}
RECORDS, LENGTH = 4, 256
LORA: dict[str, Any] = {"rank": 16}
QLORA = LORA | {"quantise": {"kind": "nf4"}}


def ways(layers: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Settings of a row by what is changed of the plain ones; `length`: of its records."""
    last = [f"model.layers.{layer}.*" for layer in range(layers - layers // 4, layers)]
    return {
        "plain": {},
        "micro-batches of a quarter": {"train": {"token_budget": tokens // 4}},
        "checkpointing": {"train": {"checkpointing": True}},
        "Adafactor": {"train": {"optimizer": "adafactor"}},
        "8-bit AdamW": {"train": {"optimizer": "adamw8bit"}},
        "frozen but for the last quarter": {"adapter": {"kind": "weights", "train": [*last, "lm_head.weight"]}},
        "LoRA": {"adapter": LORA},
        "LoRA over int8": {"adapter": LORA | {"quantise": {"kind": "int8"}}},
        "QLoRA": {"adapter": QLORA},
        "records of half the length": {"length": LENGTH // 2},
        "bf16": {"train": {"precision": "bf16"}},
        "QLoRA, 8-bit AdamW, checkpointing, micro-batches": {
            "adapter": QLORA,
            "train": {"optimizer": "adamw8bit", "checkpointing": True, "token_budget": tokens // 4},
        },
    }


def run(*, small: bool = False, repeats: int | None = None) -> list[dict[str, Any]]:
    from pipeline.flow import heap
    from tests.benchmarks import memory_way  # all imports, once: ways are forked, and nothing is computed here

    heap.keep_freed()
    shape, records = (SMOKE, 4) if small else (SHAPE, RECORDS)
    chosen = {k: v for k, v in ways(shape["layers"], records * LENGTH).items() if k == "plain" or wanted(k)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        _forked(memory_way.save, {"model": shape, "warm": SMOKE | {"layers": shape["layers"]}}, folder)
        for repeat in range(repeats or 1):
            for name, settings in chosen.items():
                told = {
                    "shape": shape,
                    "warm": SMOKE | {"layers": shape["layers"]},
                    "records": records,
                    "length": LENGTH,
                    **settings,
                }
                found[name].append(_forked(memory_way.measure, told, folder))
                say(f"{name}, {repeat + 1}: {found[name][-1]}")
    median = lambda name, what: statistics.median(one[what] for one in found[name])
    return [
        Figure(
            "memory",
            f"{name}, {median(name, 'seconds'):.2f} s a step",
            median(name, "mb"),
            median("plain", "mb"),
            "MB",
            higher_is_better=False,
            more={
                "seconds": round(median(name, "seconds"), 3),
                "times_plain": round(median(name, "seconds") / median("plain", "seconds"), 2),
                "trained": found[name][0]["trained"],
                "loss": found[name][0]["loss"],
            },
        ).line()
        for name in found
    ]


def _forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a child of this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as problem:
        raise SystemExit(f"{function.__name__}{arguments}: ended without a figure") from problem
    finally:
        child.join()
