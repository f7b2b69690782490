"""Which attention and which view a config asks for: the one place where options of attention are told apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.llama.modeling import LlamaAttention
from pipeline.llama.options.latent import CompressedLatentAttention, LatentAttention
from pipeline.llama.options.masked import MaskedAttention, MaskedView, SequenceAttention, SequenceView, View
from pipeline.llama.options.rope import RectifiedAttention, new_rotary
from pipeline.llama.options.windows import new_sight


def new_view(config: Any) -> tuple[View, type[nn.Module]]:
    """What the layers of a forward share, and the attention of each layer."""
    rotary = new_rotary(config) if config.positions == "rotary" else None
    sight = new_sight(config)
    if config.attention == "latent":
        compressed = config.q_lora_rank is not None
        return MaskedView(config, rotary, sight), CompressedLatentAttention if compressed else LatentAttention
    if config.positions in ("alibi", "t5") or config.first_tokens or config.prefix_attention:
        return MaskedView(config, rotary, sight), MaskedAttention
    if rotary is None or config.sliding_window:
        return SequenceView(config, rotary, sight), SequenceAttention
    return View(config, rotary, sight), RectifiedAttention if config.rerope_window else LlamaAttention
