"""Normalisations, and where they stand in a layer.

    norm             rms (Zhang and Sennrich 2019), layer (Ba et al. 2016), deep (Wang et al. 2022)
    norm_placement   pre        x + f(norm(x))                 Xiong et al. 2020; a last norm behind all layers
                     post       norm(x + f(x))                 Vaswani et al. 2017; deep: norm(alpha x + f(x))
                     sandwich   x + norm(f(norm(x)))           Ding et al. 2021 (CogView), section 2.4; a last norm

DeepNorm is a LayerNorm in post-norm with a stronger residual and weaker new weights, by the number of layers M of a
decoder (Wang et al. 2022, figure 2): alpha = (2M)^(1/4), and Xavier's normal initialisation with gain
beta = (8M)^(-1/4) for the feed-forward, the values and the output projection, gain 1 for queries and keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.llama.modeling import LlamaRMSNorm


def new_norm(config: Any) -> nn.Module:
    """`rms_norm_eps` is the epsilon of every kind."""
    if config.norm == "rms":
        return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, config.rms_norm_eps)


def last_norm(config: Any) -> nn.Module:
    """Behind all layers; a post-norm's output is normed already."""
    return nn.Identity() if config.norm_placement == "post" else new_norm(config)


def deep_alpha(layers: int) -> float:
    """Scale of the residual."""
    return (2.0 * layers) ** 0.25


def deep_beta(layers: int) -> float:
    """Gain of the new weights behind it."""
    return (8.0 * layers) ** -0.25


class _Layer(GradientCheckpointingLayer):
    """A decoder layer of an attention and a feed-forward, which are given."""

    def __init__(self, config: Any, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.self_attn: Any = attention
        self.mlp = feed_forward

    def attended(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        """Of a forest [1, T, D] or of rows [B, L, D]; `shared` is the same for all layers."""
        if "forest" in shared:
            return self.self_attn.on_forest(x, **shared)
        return self.self_attn(x, **shared)[0]


class PreNorm(_Layer):
    def __init__(self, config: Any, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__(config, attention, feed_forward)
        self.input_layernorm, self.post_attention_layernorm = new_norm(config), new_norm(config)

    def forward(self, hidden_states: Tensor, **shared: Any) -> Tensor:
        x = hidden_states + self.attended(self.input_layernorm(hidden_states), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class PostNorm(_Layer):
    def __init__(self, config: Any, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__(config, attention, feed_forward)
        self.post_attention_layernorm, self.post_feedforward_layernorm = new_norm(config), new_norm(config)
        self.alpha = 1.0
        if config.norm == "deep":
            self.alpha, beta = deep_alpha(config.num_hidden_layers), deep_beta(config.num_hidden_layers)
            for name, module in self.named_modules():
                if name.startswith(("self_attn.", "mlp.")) and name != "mlp.gate":
                    module.__dict__["gain"] = 1.0 if name.endswith(("q_proj", "k_proj")) else beta

    def forward(self, hidden_states: Tensor, **shared: Any) -> Tensor:
        attended = self.attended(hidden_states, shared)
        x = self.post_attention_layernorm(torch.add(attended, hidden_states, alpha=self.alpha))
        return self.post_feedforward_layernorm(torch.add(self.mlp(x), x, alpha=self.alpha))


class SandwichNorm(_Layer):
    def __init__(self, config: Any, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__(config, attention, feed_forward)
        self.input_layernorm, self.post_attention_layernorm = new_norm(config), new_norm(config)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = new_norm(config), new_norm(config)

    def forward(self, hidden_states: Tensor, **shared: Any) -> Tensor:
        attended = self.attended(self.input_layernorm(hidden_states), shared)
        x = hidden_states + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


PLACEMENTS: dict[str, type[_Layer]] = {"pre": PreNorm, "post": PostNorm, "sandwich": SandwichNorm}


def deep_initialise(module: nn.Module, gain: float) -> None:
    """New weights of a module of a layer under DeepNorm."""
    for name, weight in module.named_parameters(recurse=False):
        if weight.ndim > 1:
            outputs, inputs = weight.shape[-2:]
            outputs //= 2 if name == "gate_up_proj" else 1  # two matrices above each other
            initialization.normal_(weight, std=gain * math.sqrt(2.0 / (inputs + outputs)))
