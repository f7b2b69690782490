"""The precision that `auto` means. No torch until a GPU is asked: `rlhf estimate` reads this too.

bfloat16_is_fast("cpu")             whether PyTorch multiplies bfloat16 in vector units here
chosen_precision("auto", "cpu")     bf16 where it does, fp32 elsewhere
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What PyTorch asks of a processor (ATen/native/mkldnn/Utils.h, mkldnn_bf16_device_check). Where it finds less a product
# takes one thread and a loop of single multiplications: 12 times the time of float32 in pretraining on a Zen 3.
NEEDED = {"x86_64": {"avx512bw", "avx512vl", "avx512dq"}, "aarch64": {"bf16"}}


@cache
def bfloat16_is_fast(device: str) -> bool:
    """Of a device of this type (cpu, cuda) in this machine."""
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    needed = NEEDED.get(platform.machine())
    return needed is not None and needed <= _flags()


def chosen_precision(wanted: str, device: str) -> str:
    """fp32 or bf16 of `train.precision`."""
    if wanted != "auto":
        return wanted
    return "bf16" if bfloat16_is_fast(device) else "fp32"


def _flags() -> set[str]:
    """What Linux says that the first processor can do; nothing on other systems."""
    if not CPUINFO.exists():
        return set()
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), set())
