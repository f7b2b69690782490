"""LLaMA with other parts: the layers of a `CoreConfig`, put together when the model is built.

Embedding, trunk, heads, cache and forests are those of `modeling.py`; `options/` has the parts, one file for each
kind. A forward pass asks nothing about options: the chosen modules do the work. Registered with transformers' Auto
classes under our own model type; those of "llama" and "mixtral" stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from pipeline.data.forest import Forest
from pipeline.llama.core_config import CoreConfig
from pipeline.llama.modeling import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from pipeline.llama.options import MODEL_TYPE, experts
from pipeline.llama.options.feed_forward import new_feed_forward
from pipeline.llama.options.norms import PLACEMENTS, deep_initialise, last_norm
from pipeline.llama.options.rope import RectifiedAttention, new_rotary


class CorePreTrainedModel(LlamaPreTrainedModel):
    config_class = CoreConfig
    _no_split_modules = [layer.__name__ for layer in PLACEMENTS.values()]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        experts.initialise(module, self.config.initializer_range)
        if "gain" in module.__dict__:  # given by DeepNorm
            deep_initialise(module, module.__dict__["gain"])


class CoreModel(CorePreTrainedModel, LlamaModel):
    def _build(self, config: Any) -> None:
        layer, attention = PLACEMENTS[config.norm_placement], LlamaAttention
        if config.rerope_window:
            attention = RectifiedAttention
        self.layers = nn.ModuleList(
            layer(config, attention(config, i), new_feed_forward(config)) for i in range(config.num_hidden_layers)
        )
        self.rotary = new_rotary(config)
        self.norm = last_norm(config)

    def _on_forest(self, x: Tensor, forest: Forest, positions: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x, {"forest": forest, "factors": self.rotary.factors(forest, positions)}


class CoreForCausalLM(CorePreTrainedModel, LlamaForCausalLM):
    trunk = CoreModel


class CoreForSequenceClassification(CorePreTrainedModel, LlamaForSequenceClassification):
    trunk = CoreModel


AutoConfig.register(MODEL_TYPE, CoreConfig)
AutoModel.register(CoreConfig, CoreModel)
AutoModelForCausalLM.register(CoreConfig, CoreForCausalLM)
AutoModelForSequenceClassification.register(CoreConfig, CoreForSequenceClassification)
# Experts lie one by one in files, as Mixtral's do, and in one tensor in memory. Of its renaming of a whole block
# the router's and the experts' is taken: a feed-forward without experts keeps LLaMA's names.
_, *_merging = get_checkpoint_conversion_mapping("mixtral")
_renaming = [WeightRenaming(f".block_sparse_moe.{part}", f".mlp.{part}") for part in ("gate.weight", "experts")]
register_checkpoint_conversion_mapping(MODEL_TYPE, [*_renaming, *_merging])
