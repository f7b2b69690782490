from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.flow.errors import UserError
from pipeline.train import zero
from pipeline.train.strategy import Strategy, build, for_row
from tests.train.ranks import train, train_held, train_spiky


def torchrun(
    out: Path, processes: int, *arguments: str, ends: bool = True, script: str = "ranks.py"
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)] if ends else []


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(build(device="cpu"))


def assert_same(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert [r["world"] for r in ranks] == [len(ranks)] * len(ranks)
    assert not any(r["lines"] for r in ranks[1:])  # rank 0 alone writes
    assert alone["kept"] == 2 and len(alone["lines"]) == 3 and all(r["kept"] == 2 for r in ranks)
    assert all(r["evaluations"] == ranks[0]["evaluations"] and r["last"] == ranks[0]["last"] for r in ranks)
    for line, expected in zip(ranks[0]["lines"], alone["lines"], strict=True):
        assert line["tokens"] == expected["tokens"] and line["learning_rate"] == expected["learning_rate"]
        for name in ("loss", "nll", "gradient_norm", "heldout/nll"):
            assert (name in line) == (name in expected)
            assert name not in line or line[name] == pytest.approx(expected[name], rel=1e-5), name
    for name, values in alone["weights"].items():
        norm = sum(v * v for v in values) ** 0.5
        for found in (r["weights"][name] for r in ranks):
            apart = sum((a - b) ** 2 for a, b in zip(found, values, strict=True)) ** 0.5
            assert apart <= 1e-5 * norm, name


def test_two_ranks_train_like_one_on_ragged_batches(tmp_path: Path, alone: dict[str, Any]) -> None:
    assert_same(torchrun(tmp_path / "ddp", 2, "ddp"), alone)


def test_two_ranks_of_sharded_weights_train_like_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    assert_same(torchrun(tmp_path / "fsdp", 2, "fsdp"), alone)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_skip_the_steps_that_one_skips(tmp_path: Path, strategy: str) -> None:
    alone: dict[str, Any] = train_spiky(build(device="cpu"))
    for rank in torchrun(tmp_path / strategy, 2, strategy, "2", "spikes"):
        assert rank["skipped"] == alone["skipped"] == [0, 0, 0, 0, 0, 1, 0]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, values in alone["weights"].items():
            assert rank["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


HOLDING = [("fsdp", "2"), ("deepspeed", "1"), ("deepspeed", "2"), ("deepspeed", "3")]


@pytest.mark.parametrize(
    "way", [("ddp", "2"), *(pytest.param(way, marks=pytest.mark.slow) for way in HOLDING)], ids=str
)
def test_what_is_held_for_a_while_starts_as_if_it_had_never_waited(tmp_path: Path, way: tuple[str, str]) -> None:
    """Adam's step counts the updates that reached a parameter: steps of rate 0 would shorten the first real ones."""
    alone: dict[str, Any] = train_held(build(device="cpu"))
    assert alone["still"] == [True, True, False, False, False]
    for rank in torchrun(tmp_path / way[0], 2, *way, "held"):
        assert rank["still"] == alone["still"]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, values in alone["weights"].items():
            assert rank["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_trains_like_one_process(tmp_path: Path, alone: dict[str, Any], stage: str, processes: int) -> None:
    assert_same(torchrun(tmp_path / "zero", processes, "deepspeed", stage), alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_train_like_one(tmp_path: Path, alone: dict[str, Any], strategy: str) -> None:
    assert_same(torchrun(tmp_path / strategy, 4, strategy), alone)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="launch.device: cuda, but PyTorch finds no such device here"):
        build(device="cuda")


@pytest.mark.parametrize("offload", ["optimizer", "all"])
@pytest.mark.parametrize("stage", ["2", "3"])
def test_offloaded_zero_trains_like_one_process(
    tmp_path: Path, alone: dict[str, Any], stage: str, offload: str
) -> None:
    if (stage, offload) != ("2", "all"):  # parameters are offloaded by ZeRO-3 alone
        assert_same(torchrun(tmp_path / "zero", 2, "deepspeed", stage, "records", offload), alone)


def stopped(out: Path, processes: int, *arguments: str) -> list[dict[str, Any]]:
    """All ranks leave in the third step; the same command afterwards."""
    torchrun(out, processes, *arguments, ends=False)
    left = sorted(p.name for p in Path(f"{out}.work/checkpoints").glob("step-*"))
    assert left[:1] == ["step-000001"] and "step-000003" not in left  # the second was being written, perhaps
    return torchrun(out, processes, *arguments)


def assert_same_bits(found: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    for one, other in zip(found, whole, strict=True):
        assert [one[k] for k in ("last", "evaluations", "weights")] == [
            other[k] for k in ("last", "evaluations", "weights")
        ]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_that_were_stopped_go_on_to_the_same_bits(tmp_path: Path, strategy: str) -> None:
    whole = torchrun(tmp_path / "whole", 2, strategy)
    assert_same_bits(stopped(tmp_path / "parts", 2, strategy, "2", "stopped"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_stopped_zero_goes_on_to_the_same_bits(tmp_path: Path, stage: str, processes: int) -> None:
    whole = torchrun(tmp_path / "whole", processes, "deepspeed", stage)
    assert_same_bits(stopped(tmp_path / "parts", processes, "deepspeed", stage, "stopped"), whole)


POISONED = [("ddp", "2", "fp32"), ("fsdp", "2", "fp32")]
POISONED += [("deepspeed", stage, precision) for stage in ("1", "2", "3") for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way[:2] == ("deepspeed", "2") else pytest.mark.slow) for way in POISONED]
)
def test_a_gradient_that_is_none_leaves_weights_and_moments_alone(tmp_path: Path, way: tuple[str, str, str]) -> None:
    strategy, stage, precision = way
    for rank in torchrun(tmp_path / "nan", 2, strategy, stage, "poisoned", "none", precision):
        assert "step 3: gradient norm is" in rank["message"] and "the weights are those of step 2" in rank["message"]
        assert rank["same"] and rank["done"] == 2


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="2 asked for, but this process is one of 1"):
        build(processes=2, strategy="ddp")
    with pytest.raises(UserError, match="launch.strategy"):
        build(strategy="magic")


def test_a_row_brings_its_own_launch_settings() -> None:
    row = SimpleNamespace(launch={"device": "cpu", "threads": 2, "preload": True}, world=1)
    made = for_row(row)
    assert (made.rank, made.world, made.main, made.device.type) == (0, 1, True, "cpu")
    assert made.gather({"x": 0.1}) == [{"x": 0.1}]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharing_is_a_partition_of_nearly_equal_loads(world: int) -> None:
    sizes = [7, 1, 12, 3, 9, 9, 2, 5, 4, 11]
    shares = [
        Strategy(SimpleNamespace(process_index=rank, num_processes=world)).share(sizes)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_deepspeed_sees_no_accumulation_and_no_clipping_of_its_own() -> None:
    plain = zero.configuration(3, "all", "bf16", 0.0, {"zero_optimization": {"overlap_comm": True}})
    assert plain["gradient_accumulation_steps"] == 1
    assert plain["gradient_clipping"] == 1e6  # 0 would silently become 1.0
    assert plain["zero_optimization"]["stage"] == 3 and plain["zero_optimization"]["overlap_comm"]
    assert plain["zero_optimization"]["offload_param"] == {"device": "cpu"} and plain["bf16"]["enabled"]
