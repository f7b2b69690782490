"""The sizes of a LLaMA as an estimate needs them, and of the adapters over it. No torch: planning imports this.

shape = Shape.of(PRESETS["llama-7b"])
shape.parameters                    6,738,415,616
lora_parameters(shape, 8, "query_value")     4,194,304
kv_bytes(shape)                     524,288 bytes a token in 16 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.llama.adapters import TARGETS, LoraSettings, require_linear, require_projections
from pipeline.llama.options import GATED, chosen
from pipeline.llama.presets import attention_projections, cached_numbers, head_dim, parameter_count


@dataclass(frozen=True)
class Shape:
    """Widths and counts. `queries` and `keys` are widths of all heads together; `inner` is that of one feed-forward.

    attention name, inputs and outputs of its linear layers
    cached    numbers that a token puts into the cache, all layers
    experts   feed-forwards of a layer that a router chooses among, 0 where there is one; `active` compute each token
    gated     two products read a feed-forward's input, otherwise one
    """

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    queries: int
    keys: int
    tied: bool
    parameters: int  # of the causal LM, a tied head once
    attention: tuple[tuple[str, int, int], ...]
    cached: int
    experts: int = 0
    active: int = 1
    gated: bool = True

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> Shape:
        """From the arguments of a config (`ModelSettings.llama`), or a config.json."""
        option = chosen(shape)
        heads = shape["num_attention_heads"]
        full = {**shape, "num_key_value_heads": shape.get("num_key_value_heads") or heads}
        size = head_dim(full)
        queries, keys = heads * size, full["num_key_value_heads"] * size
        if option["attention"] == "latent":  # keys and values as they are multiplied, half of both together
            size = option["qk_nope_head_dim"] + option["qk_rope_head_dim"]
            queries, keys = heads * size, heads * (size + option["v_head_dim"]) // 2
        return cls(
            vocabulary=full["vocab_size"],
            hidden=full["hidden_size"],
            inner=full["intermediate_size"],
            layers=full["num_hidden_layers"],
            heads=heads,
            queries=queries,
            keys=keys,
            tied=bool(full.get("tie_word_embeddings")),
            parameters=parameter_count(full),
            experts=option["num_local_experts"],
            active=option["num_experts_per_tok"] if option["num_local_experts"] else 1,
            gated=option["feed_forward"] in GATED,
            attention=tuple((name, *sizes) for name, sizes in attention_projections(full).items()),
            cached=cached_numbers(full),
        )

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head, which are one where they are tied."""
        return self.vocabulary * self.hidden

    @property
    def scalar_parameters(self) -> int:
        """Of a reward or value model: one output in place of the head over the vocabulary."""
        return self.parameters - (0 if self.tied else self.table) + self.hidden

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a decoder layer, by name; experts are none."""
        attention = {name: (inputs, outputs) for name, inputs, outputs in self.attention}
        gate = {"gate_proj": (self.hidden, self.inner)} if self.gated else {}
        feed_forward = gate | {"up_proj": (self.hidden, self.inner), "down_proj": (self.inner, self.hidden)}
        return attention | ({} if self.experts else feed_forward)

    def _matrices(self, experts: int) -> int:
        """Parameters of a decoder layer that stand in products, with so many of its experts and its router."""
        linear = sum(a * b for a, b in self.projections.values())
        one = (3 if self.gated else 2) * self.hidden * self.inner
        return linear + (experts * one + self.experts * self.hidden if self.experts else 0)

    @property
    def layer_matrices(self) -> int:
        """Parameters of a decoder layer that stand in products: all but norms and biases."""
        return self._matrices(self.experts)

    @property
    def trunk(self) -> int:
        """Those of all layers."""
        return self.layers * self.layer_matrices

    @property
    def computed(self) -> int:
        """Those of all layers that compute a token: of its experts only."""
        return self.layers * self._matrices(self.active)


def lora_parameters(shape: Shape, rank: int, targets: str) -> int:
    """Trained by LoRA: A [rank, inputs] and B [outputs, rank] of every target (Hu et al. 2021, section 4.1)."""
    require_linear(shape.experts, targets)
    require_projections("latent" if "kv_b_proj" in shape.projections else "full")
    found = [shape.projections[name] for name in TARGETS[targets] if name in shape.projections]
    return shape.layers * sum(rank * sum(projection) for projection in found)


def kv_bytes(shape: Shape, width: float = 2) -> float:
    """What one token puts into the cache, all layers, `width` bytes a number."""
    return shape.cached * width


@dataclass(frozen=True)
class Model:
    """One model of a row.

    base      the row or source whose whole weights it holds: frozen models of one base can hold them once
    adapter   what is over them
    scalar    one output: a reward or value model
    """

    shape: Shape
    base: str
    adapter: LoraSettings | None = None
    scalar: bool = False

    @property
    def whole(self) -> int:
        """Parameters without an adapter's."""
        return self.shape.scalar_parameters if self.scalar else self.shape.parameters

    @property
    def own(self) -> int:
        """An adapter's parameters; of a scalar model with the copy of the head that is trained beside it."""
        if self.adapter is None:
            return 0
        head = self.shape.hidden if self.scalar else 0
        return lora_parameters(self.shape, self.adapter.rank, self.adapter.targets) + head

    @property
    def trained(self) -> int:
        """Parameters that training moves."""
        return self.own or self.whole

    @property
    def parameters(self) -> int:
        return self.whole + self.own
