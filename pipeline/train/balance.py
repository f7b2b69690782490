"""The load-balancing loss of mixtures of experts, a term of every training step, and what their routers did.

    routers = Routers(module)
    routers.forget()
    terms, metrics = routers.taken(forest)      around the forward pass of a micro-batch

The loss is not linear in its tokens: it is computed for each micro-batch as transformers does for a batch, and weighed
by tokens over the step. So it alone depends a little on how a step is cut into micro-batches and shared by ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest
from pipeline.llama.core import CoreModel
from pipeline.llama.options.experts import Experts, balance
from pipeline.train.metrics import Number

TERM = "router"


class Routers:
    """Those of each trunk in a module: a policy's, and a value model's where that has its own. False without any."""

    def __init__(self, module: nn.Module) -> None:
        trunks = [trunk for trunk in module.modules() if isinstance(trunk, CoreModel)]
        found = [[m for m in trunk.modules() if isinstance(m, Experts)] for trunk in trunks]
        self.trunks = [blocks for blocks in found if blocks]

    def __bool__(self) -> bool:
        return bool(self.trunks)

    def forget(self) -> None:
        """Before a forward pass: what a recomputation left behind belongs to no loss."""
        for block in (block for blocks in self.trunks for block in blocks):
            block.routed = None

    def taken(self, forest: Forest) -> tuple[dict[str, Tensor], dict[str, tuple[Number, Number]]]:
        """Summed over tokens, as a loss function gives its terms. A trunk that took no part is left out."""
        terms: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        tokens, counted = len(forest), 0
        for blocks in self.trunks:
            routed = [block.routed for block in blocks if block.routed is not None]
            if not routed:
                continue
            found = balance(torch.stack([logits[:tokens] for logits in routed]), blocks[0].each)
            terms[TERM] = terms.get(TERM, 0.0) + blocks[0].coefficient * tokens * found.loss
            for name, value in found._asdict().items():
                sums[name] = sums.get(name, 0.0) + value.detach() * tokens
            counted += tokens
        self.forget()
        return terms, {f"{TERM}/{name}": (total, counted) for name, total in sums.items()}
