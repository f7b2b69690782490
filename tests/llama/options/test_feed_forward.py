"""Feed-forwards against numbers by hand and their formulas in double precision."""

from __future__ import annotations

import pytest
import torch

from pipeline.llama.core_config import CoreConfig
from pipeline.llama.options import ACTIVATIONS, GATED
from pipeline.llama.options.feed_forward import new_feed_forward

FUNCTIONS = {
    "swiglu": torch.nn.functional.silu, "geglu": torch.nn.functional.gelu, "glu": torch.sigmoid,
    "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "tanh": torch.tanh,
}  # fmt: skip
BY_HAND = {  # f(1) by the definition of each
    "swiglu": 0.7310586, "geglu": 0.8413447, "glu": 0.7310586, "relu": 1.0, "gelu": 0.8413447, "silu": 0.7310586,
    "tanh": 0.7615942,
}  # fmt: skip


def block(kind: str, bias: bool = False):
    torch.manual_seed(0)
    return new_feed_forward(
        CoreConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, feed_forward=kind, mlp_bias=bias)
    )


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_kind_is_its_formula(kind: str) -> None:
    for bias in (False, True):
        made, x = block(kind, bias), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
        found = made(x)
        weights = {name: p.double() for name, p in made.named_parameters()}

        def product(name: str, x: torch.Tensor, weights=weights) -> torch.Tensor:
            return x @ weights[f"{name}_proj.weight"].t() + weights.get(f"{name}_proj.bias", 0.0)

        up = product("up", x.double())
        inner = FUNCTIONS[kind](product("gate", x.double())) * up if kind in GATED else FUNCTIONS[kind](up)
        assert (found - product("down", inner)).abs().max() <= 1e-6
        assert hasattr(made, "gate_proj") == (kind in GATED)


@pytest.mark.parametrize("kind", BY_HAND)
def test_every_kind_by_hand(kind: str) -> None:
    """Weights 1 in one channel and input 1: act(1), times up 1 where there is a gate."""
    made = block(kind)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
            p[0, 0] = 1.0
        x = torch.zeros(1, 16)
        x[0, 0] = 1.0
        assert made(x)[0, 0].item() == pytest.approx(BY_HAND[kind], abs=1e-6)
    assert set(ACTIVATIONS) == set(BY_HAND)
