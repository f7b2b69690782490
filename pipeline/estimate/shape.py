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
    TARGETS,
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PTuningSettings,
    VirtualSettings,
)
from pipeline.llama.presets import head_dim, parameter_count
from pipeline.llama.quantise_settings import Int8Settings, Nf4Settings


@dataclass(frozen=True)
class Shape:
    """Widths and counts. `queries` and `keys` are widths of all heads together."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    queries: int
    keys: int
    tied: bool
    parameters: int  # of the causal LM, a tied head once

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> Shape:
        """From the arguments of transformers' LlamaConfig, or a config.json."""
        heads = shape["num_attention_heads"]
        full = {**shape, "num_key_value_heads": shape.get("num_key_value_heads") or heads}
        size = head_dim(full)
        return cls(
            vocabulary=full["vocab_size"],
            hidden=full["hidden_size"],
            inner=full["intermediate_size"],
            layers=full["num_hidden_layers"],
            heads=heads,
            queries=heads * size,
            keys=full["num_key_value_heads"] * size,
            tied=bool(full.get("tie_word_embeddings")),
            parameters=parameter_count(full),
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
        """(inputs, outputs) of the linear layers of a decoder layer, by name."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of a decoder layer that stand in products: all but norms and biases."""
        return sum(a * b for a, b in self.projections.values())

    @property
    def trunk(self) -> int:
        """Those of all layers."""
        return self.layers * self.layer_matrices


def adapter_parameters(shape: Shape, adapter: AnyAdapter, stored: bool = False) -> int:
    """What an adapter trains. `stored`: one that was saved, without the network that computed its virtual tokens.

    LoRA has A [rank, inputs] and B [outputs, rank] for every target (Hu et al. 2021, section 4.1), DoRA a length for
    each output beside; IA3 a factor for each key, value and inner activation; the others as peft makes them.
    """
    hidden, keys, layers = shape.hidden, shape.keys, shape.layers
    if isinstance(adapter, LoraSettings):
        sides = [shape.projections[name] for name in TARGETS[adapter.targets]]
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
    """Keys and values of one token in all layers, `width` bytes a number."""
    return 2 * shape.layers * shape.keys * width


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
            return set(TARGETS[self.adapter.targets])
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
