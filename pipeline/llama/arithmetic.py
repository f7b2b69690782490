"""Faster matrix products in training on a CPU, where they cost no precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

EXACT = 4e-6  # relative error up to which a product counts as float32


@contextmanager
def fast_products(device: torch.device, precision: str) -> Iterator[None]:
    """Route float32 products to oneDNN for the time of a training step.

    PyTorch sends them to MKL, which leaves AVX-512 unused on AMD. Precision "medium" selects oneDNN, which
    computes in float32 on most machines but may use bfloat16 units where a CPU has them: there everything
    stays as it is. Decoding is slower through oneDNN, so this is never set globally.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu" or precision != "fp32" or before != "highest" or not medium_is_exact():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def medium_is_exact() -> bool:
    """Whether "medium" has float32-level error on this CPU; bfloat16 products are off by 1e-3."""
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool((product - exact).abs().max() / exact.abs().max() < EXACT)
