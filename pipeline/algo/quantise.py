"""Weights and activations in 8 and 4 bits: absmax, products that keep outliers apart, NF4 with double quantisation.

The arithmetic in the open, for tests and for reading. Training computes the same through bitsandbytes, whose codes
these are; nothing here is fast.

    absmax(x)             int8 of one scale for all numbers, or of one for each row (`dim=-1`)
    product(x, w)         x w^T in int8, rows of both with scales of their own, columns with outliers in full
                          (Dettmers et al. 2022, "LLM.int8()", section 3)
    nf4(x)                4 bits a number in blocks of 64; `double` has their scales in 8 bits too
                          (Dettmers et al. 2023, "QLoRA", section 3 and appendix E)

Shapes: N and O rows, D columns, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 64  # numbers that share a scale
SCALES_BLOCK = 256  # scales that share one of theirs
OUTLIER = 6.0  # size from which an activation is one (LLM.int8(), section 3.2)
OFFSET = 0.9677083  # probability whose quantile is scaled to 1 in NF4: bitsandbytes' create_normal_map


@dataclass(frozen=True)
class Int8:
    """x is about codes * scale; the largest error is half of the scale."""

    codes: Tensor  # int8, of x's shape
    scale: Tensor  # float32, [] or [..., 1]

    def dequantised(self) -> Tensor:
        return self.codes.float() * self.scale


def absmax(x: Tensor, dim: int | None = None) -> Int8:
    """round(127 x / max|x|), the maximum over all numbers or along `dim`. Numbers that are all 0 stay 0."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest).float()
    return Int8((x * (127.0 / largest)).round().to(torch.int8), largest / 127.0)


def product(x_ND: Tensor, w_OD: Tensor, outliers: float | None = OUTLIER) -> Tensor:
    """x w^T [N, O]: int8 products summed as integers, scaled by row of x and row of w.

    Columns in which any x is at least `outliers` are multiplied in full, by the weights as int8 holds them.
    """
    weights = absmax(w_OD, dim=-1)
    apart = torch.zeros(x_ND.shape[1], dtype=torch.bool)
    if outliers is not None:
        apart = (x_ND.abs() >= outliers).any(0)
    rows = absmax(x_ND.masked_fill(apart, 0.0), dim=-1)
    sums = rows.codes.long() @ weights.codes.long().T
    return sums * rows.scale * weights.scale.T + x_ND[:, apart] @ weights.dequantised()[:, apart].T


@cache
def nf4_codes() -> Tensor:
    """[16] ascending: quantiles of the normal distribution, 8 above 0, 7 below, and 0; the largest is 1.

    Evenly spaced in probability from `OFFSET` to one half, on either side (QLoRA, equation 4).
    """
    quantile = NormalDist().inv_cdf
    spaced = lambda count: [OFFSET + (0.5 - OFFSET) * i / count for i in range(count)]
    above, below = [quantile(p) for p in spaced(8)], [-quantile(p) for p in spaced(7)]
    return torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64).div(max(above)).float()


@cache
def dynamic_codes() -> Tensor:
    """[256] ascending in [-1, 1]: 7 decades, of which each holds twice as many numbers as the one below it.

    The middles of 2^e equal parts of [0.1, 1] times 10^(e - 6), for e = 0 ... 6, with both signs, 0 and 1
    (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", section 2.2, as bitsandbytes has it).
    """
    sizes = [
        10.0 ** (e - 6) * (0.1 + 0.9 * (i + 0.5) / 2**e) for e in range(7) for i in range(2**e)
    ]  # fmt: skip
    return torch.tensor(sorted([*sizes, *(-s for s in sizes), 0.0, 1.0]), dtype=torch.float64).float()


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Which of the ascending codes is nearest to each number, uint8."""
    return torch.bucketize(x, (codes[1:] + codes[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class Blocks:
    """Numbers as codes of a table, each block times a scale of its own."""

    table: Tensor
    codes: Tensor  # uint8 [n], places in the table
    scales: Tensor  # float32 [B], the largest size in each block
    block: int

    def dequantised(self) -> Tensor:
        each = self.scales.repeat_interleave(self.block)[: len(self.codes)]
        return self.table[self.codes.long()] * each


def blockwise(x: Tensor, table: Tensor, block: int) -> Blocks:
    """x [n] in blocks, the last of which may be shorter."""
    count = -(-len(x) // block)
    filled = torch.nn.functional.pad(x.float(), (0, count * block - len(x))).view(count, block)
    scales = filled.abs().amax(1)
    unit = filled / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]
    return Blocks(table, nearest(unit.flatten()[: len(x)], table), scales, block)


@dataclass(frozen=True)
class Nf4:
    """`mean` and `scales` where the blocks' scales are in 8 bits themselves: what lies off their mean."""

    shape: torch.Size
    blocks: Blocks
    mean: Tensor | None = None
    scales: Blocks | None = None

    def dequantised(self) -> Tensor:
        """float32, of the shape that was quantised."""
        blocks = self.blocks
        if self.scales is not None and self.mean is not None:
            blocks = Blocks(blocks.table, blocks.codes, self.scales.dequantised() + self.mean, blocks.block)
        return blocks.dequantised().view(self.shape)

    def packed(self) -> bytes:
        """Two numbers a byte, the first in the high half."""
        codes = torch.nn.functional.pad(self.blocks.codes, (0, len(self.blocks.codes) % 2)).view(-1, 2)
        return bytes((codes[:, 0] << 4 | codes[:, 1]).tolist())


def nf4(x: Tensor, *, double: bool = False) -> Nf4:
    """Blocks of 64 numbers of the flattened tensor, each scaled to [-1, 1], then the nearest of 16 codes."""
    blocks = blockwise(x.flatten(), nf4_codes(), BLOCK)
    if not double:
        return Nf4(x.shape, blocks)
    mean = blocks.scales.mean()
    return Nf4(x.shape, blocks, mean, blockwise(blocks.scales - mean, dynamic_codes(), SCALES_BLOCK))


def nf4_bits(*, double: bool, block: int = BLOCK, scales_block: int = SCALES_BLOCK) -> float:
    """Bits a number takes with its share of the scales (QLoRA, section 3).

    >>> nf4_bits(double=False)
    4.5
    """
    return 4 + (8 / block + 32 / (block * scales_block) if double else 32 / block)


def largest_gap() -> float:
    """The largest error of NF4 as a share of a block's scale: half of the widest gap between two codes."""
    return float(nf4_codes().diff().max() / 2)
