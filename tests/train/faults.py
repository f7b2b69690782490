"""Runs a small row once for every change that its checkpoints make to the disk, and lets that change go wrong.

LD_PRELOAD=faults.so python tests/train/faults.py DIRECTORY KIND [EVERY]      KIND: kill, torn, full

Prints JSON: how many changes there are, and a line for every one after which the same row, run again, did not end on
the same bits. Children are forked, so that torch is imported once.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # what an optimiser imports at its first step: once, not in every child

from pipeline.flow.errors import RowFailed  # noqa: E402
from pipeline.train.batches import Plan  # noqa: E402
from pipeline.train.loop import Trainer, fit  # noqa: E402
from pipeline.train.settings import TrainSettings  # noqa: E402
from pipeline.train.strategy import build  # noqa: E402
from tests.train.tiny import Listener, Tiny, next_token, records  # noqa: E402

KINDS = {"kill": 0, "torn": -1, "full": errno.ENOSPC}


def row(root: Path) -> str:
    """Three steps with a checkpoint each, of which one stays; the digest of everything that came out."""
    settings = TrainSettings(batch=2, evaluations=3, learning_rate=0.05, checkpoint_every=1, keep_last=1)
    plan = Plan(records(6), settings, seed=0, strategy=RANKS)
    made = Trainer(Tiny(dropout=0.2), next_token, settings, RANKS, total=len(plan), seed=0)
    outcome = fit(made, plan, Listener(root), evaluate=lambda: {"loss": abs(made.done - 2)})
    digest = hashlib.sha256(json.dumps([outcome.last, outcome.evaluations, outcome.kept_step]).encode())
    for name, tensor in sorted({**made.module.state_dict(), **made.state()}.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def forked(act: Any) -> tuple[int, str]:
    """Exit status of a child that runs `act`, negative for a signal, and what it returned."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(write, str(act()).encode())
            code = 0
        except RowFailed as error:
            os.write(write, str(error).encode())
            code = error.exit_code + 10
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def main(directory: str, kind: str, every: str = "1") -> None:
    shim = ctypes.CDLL(None)
    root = Path(directory) / "row"
    expected = forked(lambda: row(Path(directory) / "whole"))
    wrong: list[str] = []
    changes, step = 0, int(every)
    while True:
        changes += step
        shutil.rmtree(root, ignore_errors=True)

        def struck(n: int = changes) -> str:
            shim.fault_arm(str(root).encode(), ctypes.c_long(n), KINDS[kind])
            found = row(root)
            return found if shim.fault_seen() < n else "went on"

        code, text = forked(struck)
        if code == 0 and text == expected[1]:
            break  # the row makes no more changes than that
        told = code == 11 and "cannot be written" in text and "are free" in text
        cleared = code == 0 and text == "went on"  # a leftover that could not be removed does no harm
        if not (told or cleared if kind == "full" else code == -signal.SIGKILL):
            wrong.append(f"change {changes}: ended with {code} {text}")
        again = forked(lambda: row(root))
        if again != expected:
            wrong.append(f"change {changes}: the same row again gave {again}, expected {expected}")
    print(json.dumps({"changes": changes - step, "wrong": wrong}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    RANKS = build(device="cpu")
    main(*sys.argv[1:])
