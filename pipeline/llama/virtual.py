"""Virtual tokens: what prefix tuning, prompt tuning and P-tuning put before every text, as peft computes it.

A model's own forward is peft's business; here is the same for hidden states without a head, and for a cache of many
rows. A text's first token stands at the position after the virtual ones, as peft has it.

Shapes: B rows, L columns, V virtual tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.flow.errors import UserError


def count(model: nn.Module) -> int:
    """V, 0 for a model without virtual tokens."""
    if not hasattr(model, "get_base_model"):
        return 0
    config: Any = model.active_peft_config
    return config.num_virtual_tokens if config.is_prompt_learning else 0


def with_tokens(
    model: Any, ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor, prompts_B: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of the trunk's forward for padded rows; its last L columns are those of the rows.

    A prefix is keys and values that lie in a cache already; virtual tokens of the other kinds are embeddings before
    those of the rows. `prompts_B` tokens of each row are read as a whole (options/windows.py), and those before them.
    """
    before = count(model)
    whole = {} if prompts_B is None else {"prefix_lengths": prompts_B + before}
    if not before:
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": positions_BL, **whole}
    rows = len(ids_BL)
    mask = torch.cat((mask_BL.new_ones(rows, before), mask_BL), 1)
    if is_prefix(model):
        past = model.get_prompt(1)  # once for all rows, which a projection would round by their number
        past.batch_repeat_interleave(rows)
        inputs = {"input_ids": ids_BL, "past_key_values": past, "position_ids": positions_BL + before}
    else:
        own = model.get_base_model().get_input_embeddings()(ids_BL)
        with torch.enable_grad():  # an LSTM rounds elsewhere without gradients, and ratios are to be exactly 1
            tokens = model.get_prompt(rows).to(own.dtype)
        tokens = tokens if torch.is_grad_enabled() else tokens.detach()
        embedded = torch.cat((tokens, own), 1)
        positions = torch.arange(embedded.shape[1], device=ids_BL.device).expand(rows, -1)
        inputs = {"inputs_embeds": embedded, "position_ids": positions}
    return {**inputs, "attention_mask": mask, **whole}


def is_prefix(model: Any) -> bool:
    return model.active_peft_config.peft_type == "PREFIX_TUNING"


def refuse_checkpointing(module: nn.Module) -> None:
    """transformers leaves a cache out where activations are computed again, and a prefix lies in one."""
    for part in module.modules():
        if count(part) and is_prefix(part):
            raise UserError(
                "train.checkpointing: a prefix lies in a cache of keys and values, which cannot be computed again: set "
                "it to false, or use adapter.kind prompt or p_tuning"
            )
