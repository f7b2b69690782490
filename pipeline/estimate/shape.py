"""The sizes of a LLaMA as an estimate needs them, and of the adapters over it. No torch: planning imports this.

shape = Shape.of(PRESETS["llama-7b"])
shape.parameters                    6,738,415,616
adapter_parameters(shape, LoraSettings(rank=8, targets="query_value"))     4,194,304
kv_bytes(shape)                     524,288 bytes a token in 16 bits
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.flow.errors import UserError
from pipeline.llama.adapter_settings import (
    IA3_TARGETS,
    LATENT_TARGETS,
    TARGETS,
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PTuningSettings,
    VirtualSettings,
    require_place,
    require_reach,
)
from pipeline.llama.options import GATED, chosen
from pipeline.llama.presets import attention_projections, cached_numbers, head_dim, parameter_count
from pipeline.llama.quantise_settings import Int8Settings, Nf4Settings


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

    @property
    def latent(self) -> bool:
        """Whether attention is latent attention."""
        return "kv_b_proj" in self.projections

    def targets(self, targets: str) -> list[str]:
        """Projections that LoRA's setting of that name means; not each of them is in every model."""
        return (LATENT_TARGETS if self.latent else TARGETS)[targets]

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


def adapter_parameters(shape: Shape, adapter: AnyAdapter, stored: bool = False) -> int:
    """What an adapter trains. `stored`: one that was saved, without the network that computed its virtual tokens.

    LoRA has A [rank, inputs] and B [outputs, rank] for every target (Hu et al. 2021, section 4.1), DoRA a length for
    each output beside; IA3 a factor for each key, value and inner activation; the others as peft makes them.
    """
    hidden, keys, layers = shape.hidden, shape.keys, shape.layers
    require_reach(shape.experts, adapter)
    require_place({"attention": "latent" if shape.latent else "full"}, adapter)
    if isinstance(adapter, LoraSettings):
        sides = [shape.projections[name] for name in shape.targets(adapter.targets) if name in shape.projections]
        return layers * sum(adapter.rank * (a + b) + (b if adapter.dora else 0) for a, b in sides)
    if isinstance(adapter, Ia3Settings):
        return layers * (2 * keys + shape.inner)
    assert isinstance(adapter, VirtualSettings)
    if isinstance(adapter, PrefixSettings):
        width = adapter.projection
        if width is None:
            return adapter.tokens * layers * 2 * keys
        return adapter.tokens * keys + _linear(keys, width) + _linear(width, layers * 2 * keys)
    tokens = adapter.tokens * hidden
    if stored or not isinstance(adapter, PTuningSettings):
        return tokens
    inner = adapter.hidden
    if adapter.encoder == "mlp":
        return tokens + _linear(hidden, inner) + _linear(inner, inner) + _linear(inner, hidden)
    cells = sum(2 * 4 * inner * (inputs + inner + 2) for inputs in (hidden, 2 * inner))  # two layers, both ways
    return tokens + cells + _linear(2 * inner, 2 * inner) + _linear(2 * inner, hidden)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def matching_parameters(shape: Shape, patterns: tuple[str, ...], scalar: bool) -> int:
    """What `kind: weights` trains: the parameters whose names fit, and a scalar head. UserError where the names are not
    known, as of a model with biases."""
    sizes = {"model.embed_tokens.weight": shape.table, "model.norm.weight": shape.hidden}
    for layer in range(shape.layers):
        start = f"model.layers.{layer}."
        for name, (inputs, outputs) in shape.projections.items():
            inside = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            sizes[f"{start}{inside}.{name}.weight"] = inputs * outputs
        sizes |= {f"{start}{name}.weight": shape.hidden for name in ("input_layernorm", "post_attention_layernorm")}
    sizes |= {} if shape.tied else {"lm_head.weight": shape.table}
    if sum(sizes.values()) != shape.parameters:
        raise UserError(
            "adapter.train: this model has other parameters than a plain LLaMA, whose names an estimate knows: which "
            "of them fit the patterns cannot be said before it is opened"
        )
    if scalar:
        sizes.pop("lm_head.weight", None)
    fits = {name for pattern in patterns for name in fnmatch.filter(sizes, pattern)}
    return sum(sizes[name] for name in fits) + (shape.hidden if scalar else 0)


def kv_bytes(shape: Shape, width: float = 2) -> float:
    """What one token puts into the cache, all layers, `width` bytes a number."""
    return shape.cached * width


@dataclass(frozen=True)
class Model:
    """One model of a row.

    base      the row or source whose whole weights it holds: frozen models of one base can hold them once
    adapter   what is over them
    scalar    one output: a reward or value model
    stored    the adapter was saved, and no network computes its virtual tokens any more
    patterns  the names of the only weights that are trained
    under     parameters of frozen adapters below the adapter
    quantise  the form of the weights below the adapter, where it is few bits
    """

    shape: Shape
    base: str
    adapter: AnyAdapter | None = None
    scalar: bool = False
    stored: bool = False
    patterns: tuple[str, ...] = ()
    under: int = 0
    quantise: Nf4Settings | Int8Settings | None = None

    @property
    def whole(self) -> int:
        """Parameters without an adapter's own."""
        return (self.shape.scalar_parameters if self.scalar else self.shape.parameters) + self.under

    @property
    def own(self) -> int:
        """An adapter's parameters; of a scalar model with the copy of the head that is trained beside it."""
        if self.adapter is None:
            return 0
        return adapter_parameters(self.shape, self.adapter, self.stored) + (self.shape.hidden if self.scalar else 0)

    @property
    def trained(self) -> int:
        """Parameters that training moves."""
        if self.patterns:
            return matching_parameters(self.shape, self.patterns, self.scalar)
        return self.own or self.whole

    @property
    def parameters(self) -> int:
        return self.whole + self.own

    @property
    def targets(self) -> set[str]:
        """Projections whose inputs the backward pass needs for what is trained there."""
        if isinstance(self.adapter, LoraSettings):
            return set(self.shape.targets(self.adapter.targets))
        return set(
            IA3_TARGETS if isinstance(self.adapter, Ia3Settings) else () if self.adapter else self.shape.projections
        )

    @property
    def rank(self) -> int:
        return self.adapter.rank if isinstance(self.adapter, LoraSettings) else 0

    def saved(self) -> Model:
        """As the next row finds it."""
        adapter: Any = self.adapter.plain() if self.adapter else None
        return replace(self, adapter=adapter, stored=isinstance(adapter, PTuningSettings), patterns=())
