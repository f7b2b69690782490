"""Weights in few bits by the published formulas: int8 with outliers kept apart, NF4 with double quantisation.

For tests and for reading: rows quantise by bitsandbytes (pipeline/llama/quantised.py), which gives the same codes.
Sources: Dettmers et al. 2022 (LLM.int8()), Dettmers et al. 2023 (QLoRA), Dettmers et al. 2022b (8-bit optimizers).

Shapes: T tokens, I inputs, O outputs of a linear layer, N numbers of a tensor laid out in blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# (1/2) (2 - 1/32 - 1/30): the outermost of the quantiles that NF4's values lie at (QLoRA, appendix E).
OUTERMOST = 0.9677083
BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one of their own (QLoRA, section 3)


# ----------------------------------------------------------------------------------------------------------------- int8


def absmax(x: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes round(127 x / max|x|) as int8, and max|x|: of the whole tensor, or of every vector along `dim` (LLM.int8(),
    sections 2 and 3.1). An error is at most half a step, max|x| / 254."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    safe = torch.where(largest > 0, largest, 1.0)
    return (x * (127.0 / safe)).round().to(torch.int8), largest


def restored(codes: Tensor, largest: Tensor) -> Tensor:
    return codes * (largest / 127.0)


def outliers(x_TI: Tensor, threshold: float) -> Tensor:
    """[I] bool: the features in which some token reaches the threshold (LLM.int8(), section 3.2, which takes 6)."""
    return (x_TI.abs() >= threshold).any(0)


def mixed_product(x_TI: Tensor, codes_OI: Tensor, largest_O1: Tensor, threshold: float = 0.0) -> Tensor:
    """x W^T [T, O] of quantised weights (LLM.int8(), eq. 8): outlier features in full precision, the rest of every
    token as its own int8 vector, products of integers scaled by both. A threshold of 0 leaves nothing apart.

    Weights of outlier features are restored ones: the paper keeps them unquantised, bitsandbytes has no others.
    """
    apart = outliers(x_TI, threshold) if threshold > 0 else torch.zeros(x_TI.shape[1], dtype=torch.bool)
    # A token's scale is that of what is left of it, and only values beyond the threshold are left out of it.
    rest = x_TI.masked_fill(x_TI.abs() >= threshold, 0.0) if threshold > 0 else x_TI
    x_codes, x_largest = absmax(rest, dim=1)
    x_codes = x_codes.masked_fill(apart, 0)
    whole = x_codes.to(torch.float64) @ codes_OI.to(torch.float64).T  # integers: exact
    small = whole.to(x_TI.dtype) * (x_largest * largest_O1.T) / 127.0**2
    return small + x_TI[:, apart] @ restored(codes_OI, largest_O1).to(x_TI.dtype)[:, apart].T


# ------------------------------------------------------------------------------------------------------------------ NF4


def nf4_values() -> Tensor:
    """The 16 values, ascending from -1 to 1: quantiles of a standard normal, eight below 0 and nine above with 0
    among both, divided by the largest (QLoRA, eq. 4 and appendix E)."""
    quantile = lambda n: torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, n, dtype=torch.float64)[:-1])
    values = torch.cat((-quantile(8), torch.zeros(1, dtype=torch.float64), quantile(9).flip(0)))
    return (values / values.abs().max()).float()


class Blocks(NamedTuple):
    """Codes [N] into `values`, and the largest magnitude of every block; the last one may be short."""

    codes: Tensor
    scales: Tensor
    values: Tensor
    size: int

    def restored(self) -> Tensor:
        """[N]: the value of every code times its block's scale."""
        return self.values[self.codes.long()] * self.scales.repeat_interleave(self.size)[: len(self.codes)]


def in_blocks(x: Tensor, values: Tensor, size: int) -> Blocks:
    """The nearest of ascending `values` to every number over the largest magnitude of its block."""
    flat = x.flatten().float()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    scales = padded.abs().amax(1)
    unit = (padded * (1.0 / scales.clamp(min=1e-38))[:, None]).flatten()[: len(flat)]
    middles = (values[:-1] + values[1:]) / 2
    return Blocks(torch.bucketize(unit, middles).to(torch.uint8), scales, values, size)


def nf4(x: Tensor, size: int = BLOCK) -> Blocks:
    """QLoRA, section 3. The largest error is 0.1519 of a block's scale: half the widest gap, next to -1."""
    return in_blocks(x, nf4_values(), size)


def packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the high half; one that is left over has NF4's 0 beside it."""
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=7).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def dynamic_values() -> Tensor:
    """The 256 values of the dynamic 8-bit type, ascending: a sign, a power of ten that takes as many bits as it has
    zeros, and the middles of even steps between 0.1 and 1 in the bits that are left (8-bit optimizers, section 1.3)."""
    found = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1.0, 2**bits + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found))


class Doubled(NamedTuple):
    """Scales that are quantised themselves: codes of their distance from the mean, and that mean."""

    blocks: Blocks
    mean: Tensor

    def restored(self) -> Tensor:
        return self.blocks.restored() + self.mean


def doubled(scales: Tensor) -> Doubled:
    """Double quantisation (QLoRA, section 3): 8 bits for each scale, one float32 for 256 of them."""
    mean = scales.mean()
    return Doubled(in_blocks(scales - mean, dynamic_values(), SCALES), mean)


def bits_each(size: int = BLOCK, *, double: bool = True) -> float:
    """Bits a weight in NF4.

    >>> bits_each(double=False), bits_each()
    (4.5, 4.126953125)
    """
    return 4 + (8 / size + 32 / (size * SCALES) if double else 32 / size)
