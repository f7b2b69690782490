"""Adapters of every kind on several processes: the losses and the saved weights of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.train.strategy import build
from tests.train import adapters
from tests.train.test_strategy import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("way", [("ddp",), ("fsdp",), ("deepspeed", "2"), ("deepspeed", "3")], ids="-".join)
def test_ranks(tmp_path: Path, way: tuple[str, ...]) -> None:
    alone = adapters.table(build(device="cpu"), tmp_path / "one")
    for rank in torchrun(tmp_path / "table", 2, *way, script="adapters.py"):
        for case, expected in alone.items():
            assert rank[case]["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
            assert rank[case]["losses"][0] != rank[case]["losses"][-1]
            assert rank[case]["weights"].keys() == expected["weights"].keys()
            for name, values in expected["weights"].items():
                ours, theirs = torch.tensor(rank[case]["weights"][name]), torch.tensor(values)
                assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()), (case, name)
