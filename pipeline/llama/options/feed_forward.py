"""Feed-forward blocks: gated ones are LLaMA's with another activation, the others have one inner layer.

    swiglu, geglu, glu      down(act(gate x) * up x), act: SiLU, GELU, sigmoid         Shazeer 2020, equation 6
    relu, gelu, silu, tanh  down(act(up x))                                            Vaswani et al. 2017, section 3.3

Mixtures of gated ones are in experts.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from pipeline.llama.modeling import LlamaMLP
from pipeline.llama.options import GATED
from pipeline.llama.options.experts import Experts


class Plain(nn.Module):
    """down(act(up x))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def new_feed_forward(config: Any) -> nn.Module:
    if config.num_local_experts:
        return Experts(config)
    return LlamaMLP(config) if config.feed_forward in GATED else Plain(config)
