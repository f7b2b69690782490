"""Where a token stands, beside rotary positions: added to the input of the first layer, or to the scores of attention.

    learned      x + P[m], a table of max_position_embeddings rows            Gehring et al. 2017, section 3.1
    sinusoidal   sqrt(d) x + PE(m); the root as in section 3.4                Vaswani et al. 2017, section 3.5
    alibi        scores - slope_h |distance|                                  Press et al. 2022, section 3
    t5           scores + B[bucket(distance), h], one table for all layers    Raffel et al. 2020, section 2.1
    none         nothing: order comes from what is visible                    Kazemnejad et al. 2023

Scores stay divided by the root of the head size under T5's bias, where T5 leaves that out. Where a prompt is read in
both directions, ALiBi takes the distance without its sign, and T5 halves its buckets between both sides as its encoder
does.

Shapes: H query heads, Q queries, N keys; distances [..., Q, N] are query minus key, whole numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.flow.errors import UserError

# --- added to the input -----------------------------------------------------------------------------------------------


class Unplaced(nn.Module):
    """Nothing is added."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class Learned(nn.Embedding):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """x [..., D] at positions [...]. UserError beyond the table."""
        if positions.numel() and int(positions.max()) >= self.num_embeddings:
            raise UserError(
                f"a text of {int(positions.max()) + 1} tokens, but the model has learned {self.num_embeddings} "
                "positions: lower max_tokens, or pretrain with a larger model.max_position_embeddings"
            )
        return x + super().forward(positions)


class Sinusoidal(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return math.sqrt(x.shape[-1]) * x + sinusoids(positions, x.shape[-1]).to(x.dtype)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[...] -> float32 [..., width]: sin(m / 10000^(2i/d)) at 2i, the cosine at 2i + 1."""
    even = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * 10000.0 ** (-even / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]


# --- added to the scores ----------------------------------------------------------------------------------------------


class Unbiased(nn.Module):
    """Nothing is added."""

    def forward(self, distance: Tensor) -> Tensor:
        return distance.new_zeros(distance.shape, dtype=torch.float32).unsqueeze(-3)


class Alibi(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)

    def forward(self, distance: Tensor) -> Tensor:
        """[..., Q, N] -> float32 [..., H, Q, N]."""
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=distance.device)
        return -slopes[:, None, None] * distance.abs().unsqueeze(-3)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8/n), its square, ... for n heads; where n is no power of two, those of the next lower power, then every
    second one of the next higher, as the authors' code has it (ofirpress/attention_with_linear_biases)."""
    lower = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return (first + between)[:heads]


class Relative(nn.Embedding):
    """T5's table [buckets, H]."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.relative_attention_num_buckets, config.num_attention_heads)
        self.furthest = config.relative_attention_max_distance
        self.both_sides = config.prefix_attention

    def forward(self, distance: Tensor) -> Tensor:  # type: ignore[override]
        """[..., Q, N] -> float32 [..., H, Q, N]."""
        at = buckets(distance, self.num_embeddings, self.furthest, self.both_sides)
        return super().forward(at).float().movedim(-1, -3)


def buckets(distance: Tensor, count: int, furthest: int, both_sides: bool) -> Tensor:
    """Half of the buckets hold one distance each, the others grow by a constant factor up to `furthest`, the last one
    holds all beyond. Keys that stand behind their query share bucket 0, or have the second half of the buckets."""
    behind = torch.zeros_like(distance)
    if both_sides:
        count //= 2
        behind = (distance < 0).to(distance.dtype) * count
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = count // 2
    grown = (distance.float().clamp(min=1) / exact).log() / math.log(furthest / exact) * (count - exact)
    far = (exact + grown.to(distance.dtype)).clamp(max=count - 1)
    return behind + torch.where(distance < exact, distance, far)


def new_positions(config: Any) -> nn.Module:
    if config.positions == "learned":
        return Learned(config.max_position_embeddings, config.hidden_size)
    return Sinusoidal() if config.positions == "sinusoidal" else Unplaced()


def new_bias(config: Any) -> nn.Module:
    if config.positions == "t5":
        return Relative(config)
    return Alibi(config.num_attention_heads) if config.positions == "alibi" else Unbiased()
