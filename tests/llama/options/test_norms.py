"""Normalisations and placements against their formulas in double precision, and DeepNorm's numbers by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.llama.core import CoreForCausalLM
from pipeline.llama.core_config import CoreConfig
from pipeline.llama.options.norms import PLACEMENTS, deep_alpha, deep_beta, last_norm

SIZE = 8
ALPHA = 2.0  # of 8 layers: 16^(1/4)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def layer(x: Tensor) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True))


FORMULAS = {
    ("rms", "pre"): lambda x, f: x + f(rms(x)),
    ("layer", "pre"): lambda x, f: x + f(layer(x)),
    ("rms", "post"): lambda x, f: rms(x + f(x)),
    ("layer", "post"): lambda x, f: layer(x + f(x)),
    ("deep", "post"): lambda x, f: layer(ALPHA * x + f(x)),
    ("rms", "sandwich"): lambda x, f: x + rms(f(rms(x))),
    ("layer", "sandwich"): lambda x, f: x + layer(f(layer(x))),
}


class Attention(nn.Module):
    def forward(self, x: Tensor, **_: object) -> tuple[Tensor, None]:
        return x.sin(), None


def config(**options: object) -> CoreConfig:
    return CoreConfig(hidden_size=SIZE, num_attention_heads=2, num_hidden_layers=8, rms_norm_eps=1e-5, **options)


@pytest.mark.parametrize(("norm", "placement"), FORMULAS)
def test_a_layer_is_its_formula_around_two_blocks(norm: str, placement: str) -> None:
    options = config(norm=norm, norm_placement=placement)
    formula = FORMULAS[norm, placement]
    x = torch.randn(1, 5, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    found = PLACEMENTS[placement](options, Attention(), nn.Tanh())(x.float())
    expected = formula(formula(x, torch.sin), torch.tanh)
    assert (found - expected).abs().max() <= 1e-5
    behind = {"rms": rms, "layer": layer}.get(norm) if placement != "post" else lambda x: x
    assert (last_norm(options)(x.float()) - behind(x)).abs().max() <= 1e-5


def test_deep_scales_by_hand() -> None:
    """Wang et al. 2022, figure 2, decoders: 2 layers sqrt 2 and 1 / 2, 8 layers 2 and 8^(-1/2)."""
    assert deep_alpha(2) == pytest.approx(2**0.5) and deep_beta(2) == pytest.approx(0.5)
    assert deep_alpha(8) == pytest.approx(2.0) and deep_beta(8) == pytest.approx(8**-0.5)


@pytest.mark.parametrize("experts", [0, 3])
def test_deep_initialises_by_depth(experts: int) -> None:
    """Xavier's normal: sqrt(2 / (inputs + outputs)), queries and keys as they are, all else halved at 2 layers."""
    torch.manual_seed(0)
    made = CoreForCausalLM(
        CoreConfig(
            vocab_size=97, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.03, norm="deep", norm_placement="post",
            num_local_experts=experts,
        )
    )  # fmt: skip
    mlp = {"experts.gate_up_proj": (256, 0.5), "experts.down_proj": (256, 0.5)}
    if not experts:
        mlp = {"gate_proj.weight": (256, 0.5), "up_proj.weight": (256, 0.5), "down_proj.weight": (256, 0.5)}
    expected = {
        "self_attn.q_proj.weight": (192, 1.0), "self_attn.k_proj.weight": (144, 1.0),
        "self_attn.v_proj.weight": (144, 0.5), "self_attn.o_proj.weight": (192, 0.5),
        **{f"mlp.{name}": value for name, value in mlp.items()},
    }  # fmt: skip
    for block in made.model.layers:
        weights = dict(block.named_parameters())
        for name, (both, gain) in expected.items():
            assert weights[name].std().item() == pytest.approx(gain * (2 / both) ** 0.5, rel=0.05), name
        if experts:
            assert weights["mlp.gate.weight"].std().item() == pytest.approx(0.03, rel=0.2)
        assert (weights["post_attention_layernorm.weight"] == 1).all()
    assert made.lm_head.weight.std().item() == pytest.approx(0.03, rel=0.05)
