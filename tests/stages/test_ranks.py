"""The whole chain by two processes, under every way to share the work, and by two nodes: the figures of one process."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.flow.test_nodes import two_ports
from tests.stages.conftest import Chain

WAYS = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp", "frozen=sharded"],
    "zero1": ["strategy=deepspeed", "zero_stage=1"],
    "zero2": ["strategy=deepspeed", "zero_stage=2", "offload=optimizer"],
    "zero3": ["strategy=deepspeed", "zero_stage=3", "frozen=offloaded"],
}
SLOW = [pytest.param(way, marks=() if way == "fsdp" else pytest.mark.slow) for way in WAYS]
TRAINED = {
    "pretrain": "policy",
    "sft": "policy",
    "reward": "model",
    "ppo": "policy",
    "rejection": "policy",
    "dpo": "policy",
}


@pytest.mark.parametrize("way", SLOW)
def test_two_processes_give_the_figures_of_one(chain: Any, first: Any, tmp_path: Path, way: str) -> None:
    ran = Chain(copied(chain, tmp_path)).rlhf(*command("processes=2", *WAYS[way]))
    assert ran.returncode == 0, ran.stderr
    assert_same_chain(ran.stdout, first)


@pytest.mark.slow
def test_two_nodes_give_the_figures_of_one(chain: Any, first: Any, tmp_path: Path) -> None:
    """Two commands beside each other, each with one of two ranks."""
    shared = Chain(copied(chain, tmp_path))
    nodes = ["processes=2", "nodes=2", "strategy=ddp", "main_address=127.0.0.1", f"main_port={two_ports()}"]
    with ThreadPoolExecutor(2) as pool:
        lead, follow = pool.map(lambda n: shared.rlhf(*command(*nodes, f"node_rank={n}")), range(2))
    assert lead.returncode == 0, lead.stderr
    assert follow.returncode == 0 and "node 1: dpo" in follow.stderr, follow.stderr
    assert_same_chain(lead.stdout, first)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "zero3"])
def test_adapters_are_saved_whole(chain: Any, tmp_path: Path, way: str) -> None:
    """Only adapters are trained, and each is what one process makes of it."""
    adapters = [w for row in ("sft", "reward", "ppo", "dpo") for w in ("--set", f"{row}.adapter={{rank: 2}}")]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = Chain(copied(chain, tmp_path / "one")).rlhf(*command("processes=1"), *adapters)
    two = Chain(copied(chain, tmp_path / "two")).rlhf(*command("processes=2", *WAYS[way]), *adapters)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    alone = {row["row"]: row for row in json.loads(one.stdout)["rows"]}
    assert_same_chain(two.stdout, alone)
    for row in ("sft", "reward", "ppo", "dpo"):
        files = {path.name for path in Path(alone[row]["artifacts"][TRAINED[row]]["path"]).iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def copied(chain: Any, directory: Path) -> Path:
    for name in ("plan.yaml", "pairs.jsonl"):
        (directory / name).write_text((chain.directory / name).read_text())
    return directory


def command(*launch: str) -> list[str]:
    told = [word for setting in (*launch, "threads=1", "device=cpu") for word in ("--set", f"launch.{setting}")]
    return ["run", "plan.yaml", "--json", *told]


def assert_same_chain(stdout: str, first: Any) -> None:
    """Losses to 1e-5, and whole weights: rounding in another order is all that differs, and Adam makes 1e-3 of that
    where a gradient is next to nothing."""
    found = {row["row"]: row for row in json.loads(stdout)["rows"]}
    for row, slot in TRAINED.items():
        for figure in ("loss", "heldout_loss"):
            expected = first[row]["metrics"].get(figure)
            assert expected is None or found[row]["metrics"][figure] == pytest.approx(expected, rel=1e-5), (row, figure)
        ours, theirs = (load_file(weights_of(Path(rows[row]["artifacts"][slot]["path"]))) for rows in (found, first))
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            assert float((ours[tensor] - value).norm()) <= 1e-3 * float(value.norm()), (row, tensor)
    assert found["ppo"]["metrics"]["score"] == pytest.approx(first["ppo"]["metrics"]["score"], rel=1e-4)
    assert found["evaluate"]["status"] == "executed"  # by one process
    tokens = lambda rows: rows["ppo"]["metrics"]["tokens"]
    assert tokens(found) == tokens(first)  # the answers are the same, to the last token


def weights_of(model: Path) -> Path:
    adapter = model / "adapter_model.safetensors"
    return adapter if adapter.exists() else model / "model.safetensors"
