"""A plan's models and records, followed from row to row without reading more than the configs of model directories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.estimate.devices import Device
from pipeline.estimate.memory import Layout
from pipeline.estimate.shape import Model, Shape
from pipeline.flow.artifacts import read_object
from pipeline.flow.config import nearest
from pipeline.flow.errors import UserError
from pipeline.flow.launch import LaunchSettings
from pipeline.flow.plan import Plan, Ref, Row, Source
from pipeline.llama import quantise_settings
from pipeline.llama.adapter_settings import TARGETS, AnyAdapter, WeightsSettings, settings_of
from pipeline.llama.config import check_config, read_json
from pipeline.llama.precision import bfloat16_is_fast
from pipeline.llama.presets import PRESETS
from pipeline.llama.quantise_settings import AnyQuantise

# Mean tokens of a record of the embedded world under the quickstart's tokenizer of 1,024 tokens, measured.
WORLD = {
    "documents": 37.0, "heldout_documents": 37.0, "conversations": 32.0, "perfect_conversations": 32.0,
    "comparisons": 46.0, "heldout_pairs": 42.0, "prompts": 18.0, "dev": 18.0, "heldout": 18.0,
}  # fmt: skip
WORLD_ANSWER = 13.0  # tokens of an answer to a prompt of the world
WORLD_TOKENS_A_WORD = 1.25  # of long documents, whose last text may be longer than asked for
WORLD_LONGEST = 128  # no record of it is longer


@dataclass(frozen=True)
class Wishes:
    """What a user says that the plan does not. `tokens`: of a training row whose records nobody has counted; `prompt`:
    of a prompt; `model`: preset of policies without a path."""

    utilisation: float = 0.4
    tokens: float | None = None
    prompt: int = 256
    model: str | None = None


@dataclass(frozen=True)
class Records:
    """How many there are and how long they are on average, in tokens; None where nobody knows before reading them."""

    count: float | None = None
    tokens: float | None = None
    prompt: float | None = None  # tokens of the prompt in them
    longest: int | None = None


@dataclass
class Following:
    """What has been seen of the plan so far."""

    plan: Plan
    device: Device
    wishes: Wishes
    launch: LaunchSettings
    models: dict[str, Model] = field(default_factory=dict)  # by reference
    records: dict[str, Records] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layout(self, precision: str, optimizer: str = "adamw") -> Layout:
        return layout_of(self.launch, precision, self.device.on_cpu, optimizer)

    def model(self, ref: Ref) -> Model:
        if ref.text not in self.models:
            assert ref.source is not None
            self.models[ref.text] = self._source(self.plan.sources[ref.source])
        return self.models[ref.text]

    def _source(self, source: Source) -> Model:
        scalar = source.kind.kind == "reward_model"
        if not source.paths:
            if self.wishes.model is None:
                raise UserError(f"{source.missing()}, or --model PRESET for the shape of a known one")
            if self.wishes.model not in PRESETS:
                raise UserError(f"--model: {self.wishes.model!r} is not known{nearest(self.wishes.model, PRESETS)}")
            return Model(Shape.of(PRESETS[self.wishes.model]), source.name, scalar=scalar)
        if missing := source.missing():
            raise UserError(missing)
        path = source.paths[0]
        if (path / "adapter_config.json").is_file():
            if source.base is None:
                raise UserError(
                    f"sources.{source.name}: an adapter, whose base is not given; set sources.{source.name}.base"
                )
            below = self._source(self.plan.sources[source.base])
            under = below.under + below.own
            below = replace(
                below, adapter=_adapter(path / "adapter_config.json"), scalar=scalar, stored=True, under=under
            )
            return _in_bits(below, quantise_settings.stored(path))
        return Model(read_shape(path), source.name, scalar=scalar)

    def many(self, row: Row, slot: str) -> list[Model]:
        value = row.inputs.get(slot)
        refs = value if isinstance(value, list) else [value] if value else []
        return [self.model(ref) for ref in refs]

    def one(self, row: Row, slot: str) -> Model | None:
        return next(iter(self.many(row, slot)), None)

    def read(self, row: Row, slot: str) -> Records:
        value = row.inputs.get(slot)
        ref = value[0] if isinstance(value, list) and value else value
        return self.records.get(ref.text, Records()) if isinstance(ref, Ref) else Records()


def read_shape(path: Path) -> Shape:
    """Of a model directory, from its config.json. UserError naming the file for what is refused or missing."""
    where = path / "config.json"
    config = read_json(where)
    check_config(config, str(where))
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if type(config.get(key)) is not int]:
        raise UserError(f"{where}: {missing[0]} is missing, which an estimate needs")
    return Shape.of(config)


def _adapter(where: Path) -> AnyAdapter:
    try:
        found = settings_of(read_object(where))
    except ValueError:  # of values that are no sizes
        found = None
    if found is None:
        raise UserError(
            f"{where}: expected a LoRA adapter of rank r over {', '.join(TARGETS)} layers, IA3 over keys, values and "
            "down_proj, or virtual tokens: no other can be counted"
        )
    return found


def layout_of(launch: LaunchSettings, precision: str, on_cpu: bool, optimizer: str = "adamw") -> Layout:
    strategy = launch.strategy if launch.processes > 1 or launch.strategy == "deepspeed" else "single"
    return Layout(
        ranks=launch.processes,
        strategy=strategy,
        stage={"deepspeed": launch.zero_stage, "fsdp": 3}.get(strategy, 0),
        offload=launch.offload if strategy == "deepspeed" else "none",
        frozen=launch.frozen,
        half=precision == "bf16" or (precision == "auto" and (not on_cpu or bfloat16_is_fast("cpu"))),
        on_cpu=on_cpu,
        optimizer=optimizer,
    )


def vocabulary_of(seen: Following, ref: Ref) -> int:
    """Tokens of a tokenizer that a row above trained, or of a tokenizer.json."""
    if ref.source is None:
        return seen.models[ref.text].shape.vocabulary
    source = seen.plan.sources[ref.source]
    if missing := source.missing():
        raise UserError(missing)
    found = read_object(source.paths[0] / "tokenizer.json")
    inner = found.get("model")
    pieces = inner.get("vocab") if isinstance(inner, Mapping) else None
    added = found.get("added_tokens")
    if not isinstance(pieces, Mapping | list) or not isinstance(added, list):
        raise UserError(f"{source.paths[0]}: holds no tokenizer.json whose tokens can be counted")
    known = set(pieces) if isinstance(pieces, Mapping) else {str(piece[0]) for piece in pieces}
    return len(known | {str(token.get("content")) for token in added if isinstance(token, Mapping)})


def adapted(row: Row, start: Model, adapter: AnyAdapter | None, **changes: Any) -> Model:
    """The model that a row trains from `start`: whole under the row's own name, or an adapter over the same base."""
    model = replace(start, **changes)
    if isinstance(adapter, WeightsSettings):
        return replace(model, adapter=None, under=0, base=row.name, patterns=adapter.train, quantise=None)
    if model.adapter is None:
        model = replace(model, adapter=adapter, stored=False, base=model.base if adapter else row.name)
        return _in_bits(model, adapter.quantise if adapter else None)
    if adapter is None or adapter.beneath == "same":
        return model
    if adapter.beneath == "merge":
        model = replace(model, adapter=adapter, stored=False, under=0, base=f"{row.name}, merged", quantise=None)
        return _in_bits(model, adapter.quantise)
    return replace(model, adapter=adapter, stored=False, under=model.under + start.own)


def _in_bits(model: Model, settings: AnyQuantise | None) -> Model:
    """What roles hold in common is what is quantised alike."""
    return replace(model, quantise=settings, base=f"{model.base}, {settings.kind}") if settings else model
