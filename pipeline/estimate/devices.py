"""What devices can do: dense peaks of matrix products, memory and its bandwidth, as their vendors state them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from pipeline.flow.config import nearest
from pipeline.flow.errors import UserError


@dataclass(frozen=True)
class Device:
    """Operations a second in both precisions, bytes of memory (GB are 1e9), bytes a second or None where unknown."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float | None = None

    @property
    def on_cpu(self) -> bool:
        return self.name == "cpu"

    def peak(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


T, GB = 1e12, 1e9
# Data sheets of NVIDIA: H100 SXM, H200, A100 SXM, L40S, and the Ada architecture's white paper for the RTX 4090. bf16
# without sparsity, float32 without TF32, which PyTorch leaves off. CPU: two cores of the README's AMD EPYC, measured.
DEVICES = {
    "h100": Device("h100", 989 * T, 67 * T, 80 * GB, 3350 * GB),
    "h200": Device("h200", 989 * T, 67 * T, 141 * GB, 4800 * GB),
    "a100-80": Device("a100-80", 312 * T, 19.5 * T, 80 * GB, 2039 * GB),
    "a100-40": Device("a100-40", 312 * T, 19.5 * T, 40 * GB, 1555 * GB),
    "l40s": Device("l40s", 362 * T, 91.6 * T, 48 * GB, 864 * GB),
    "rtx4090": Device("rtx4090", 165 * T, 82.6 * T, 24 * GB, 1008 * GB),
    "cpu": Device("cpu", 0.43 * T, 0.21 * T, 0.0, 33 * GB),  # memory: this machine's
}


def device(name: str | None, *, peak: float | None = None, memory: float | None = None, default: str = "cpu") -> Device:
    """A known device, with peak (operations a second, any precision) or memory (bytes) in place of its own where given.

    A peak and a memory without a name describe a device that the table lacks. UserError for an unknown name.
    """
    if name is None and peak is not None and memory is not None:
        return Device("custom", peak, peak, memory)
    if (name or default) not in DEVICES:
        raise UserError(f"--device: {name!r} is not known{nearest(str(name), DEVICES)}; or give --peak and --memory")
    found = DEVICES[name or default]
    if found.on_cpu:
        found = replace(found, memory=machine_memory())
    if peak is not None:
        found = replace(found, bf16=peak, fp32=peak)
    return found if memory is None else replace(found, memory=memory)


def machine_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
