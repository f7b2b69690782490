"""What `auto` is, against PyTorch's own answer and on processors of other kinds."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.flow.errors import UserError
from pipeline.llama import precision
from pipeline.llama.precision import bfloat16_is_fast, chosen_precision
from pipeline.train.strategy import Strategy, for_row

ZEN_3 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ZEN_4 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16\n"
SKYLAKE = "processor\t: 0\nflags\t\t: avx512f avx512dq avx512bw avx512vl\n"
GRAVITON_3 = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def pretend(kind: str, cpuinfo: str | None) -> None:
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(precision.platform, "machine", lambda: kind)
        bfloat16_is_fast.cache_clear()

    yield pretend
    bfloat16_is_fast.cache_clear()


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc/cpuinfo is Linux's")
def test_it_is_what_pytorch_asks_the_processor() -> None:
    assert bfloat16_is_fast("cpu") == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("kind", "cpuinfo", "expected"),
    [
        ("x86_64", ZEN_3, "fp32"),
        ("x86_64", ZEN_4, "bf16"),
        ("x86_64", SKYLAKE, "bf16"),
        ("aarch64", GRAVITON_3, "bf16"),
        ("aarch64", ZEN_4, "fp32"),
        ("arm64", None, "fp32"),
        ("x86_64", None, "fp32"),
        ("riscv64", "hart\t: 0\n", "fp32"),
    ],
)
def test_auto_by_processor(machine, kind: str, cpuinfo: str | None, expected: str) -> None:
    machine(kind, cpuinfo)
    assert chosen_precision("auto", "cpu") == expected
    assert [chosen_precision(wanted, "cpu") for wanted in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("wanted", "cpuinfo", "said"),
    [
        ("auto", ZEN_3, ["train.precision: auto, which is fp32 on this cpu"]),
        ("auto", ZEN_4, ["train.precision: auto, which is bf16 on this cpu"]),
        ("bf16", ZEN_3, ["train.precision: bf16 is many times slower than fp32 on this cpu; auto would choose fp32"]),
        ("bf16", ZEN_4, []),
        ("fp32", ZEN_3, []),
    ],
)
def test_a_row_says_what_it_computes_in(machine, wanted: str, cpuinfo: str, said: list[str]) -> None:
    machine("x86_64", cpuinfo)
    heard: list[str] = []
    for_row(SimpleNamespace(launch={"device": "cpu"}, world=1, say=heard.append), precision=wanted)
    assert heard == said


def test_ranks_on_processors_of_two_kinds_are_refused(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("x86_64", ZEN_4)
    monkeypatch.setattr(Strategy, "gather", lambda self, value: [value, "fp32"])
    with pytest.raises(UserError, match="train.precision: auto is bf16 on some ranks and fp32 on others"):
        for_row(SimpleNamespace(launch={"device": "cpu"}, world=1, say=print), precision="auto")
