"""LLaMA with other parts: the layers of a `CoreConfig`, put together when the model is built.

Embedding, trunk, heads, cache and forests are those of `modeling.py`; `options/` has the parts, one file for each
kind. A forward pass asks nothing about options: the chosen modules do the work. Registered with transformers' Auto
classes under our own model type; those of "llama" and "mixtral" stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from pipeline.data.forest import Forest
from pipeline.flow.errors import UserError
from pipeline.llama import options
from pipeline.llama.core_config import CoreConfig
from pipeline.llama.modeling import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from pipeline.llama.options import MODEL_TYPE, experts
from pipeline.llama.options.feed_forward import new_feed_forward
from pipeline.llama.options.norms import PLACEMENTS, deep_initialise, last_norm
from pipeline.llama.options.positions import new_bias, new_positions
from pipeline.llama.options.views import new_view


class CorePreTrainedModel(LlamaPreTrainedModel):
    config_class = CoreConfig
    _no_split_modules = [layer.__name__ for layer in PLACEMENTS.values()]

    def __init__(self, config: Any) -> None:
        if not options.only_kernels(config.to_dict()):
            self._supports_flash_attn = self._supports_flex_attn = False
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        experts.initialise(module, self.config.initializer_range)
        if "gain" in module.__dict__:  # given by DeepNorm
            deep_initialise(module, module.__dict__["gain"])


class CoreModel(CorePreTrainedModel, LlamaModel):
    def _build(self, config: Any) -> None:
        layer = PLACEMENTS[config.norm_placement]
        self.view, attention = new_view(config)
        self.layers = nn.ModuleList(
            layer(config, attention(config, i), new_feed_forward(config)) for i in range(config.num_hidden_layers)
        )
        self.rotary = self.view.rotary
        self.positions, self.position_bias = new_positions(config), new_bias(config)
        self.norm = last_norm(config)

    def _on_forest(self, x: Tensor, forest: Forest, positions: Tensor) -> tuple[Tensor, dict[str, Any]]:
        shared = self.view.on_forest(x, forest, positions, self.position_bias)
        return self.positions(x, positions), {"forest": forest, **shared}

    def _on_rows(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        prefix_lengths: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """`prefix_lengths` [B]: how many tokens of each row are a prompt that is read as a whole, for a model that does
        so; none by default."""
        shared = self.view.on_rows(x, positions, mask, cache, self.position_bias, prefix_lengths)
        return self.positions(x, positions), shared


class CoreForCausalLM(CorePreTrainedModel, LlamaForCausalLM):
    trunk = CoreModel

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate: what stands in the cache first is the prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        cache = inputs.get("past_key_values")
        if self.config.prefix_attention and cache is None:
            raise UserError("use_cache is false, but a model with prefix_attention would read its answer as a prompt")
        if self.config.prefix_attention and not cache.get_seq_length():
            mask = inputs.get("attention_mask")
            inputs["prefix_lengths"] = torch.ones_like(input_ids).sum(-1) if mask is None else mask.sum(-1)
        return inputs


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
