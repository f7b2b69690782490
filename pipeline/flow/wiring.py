"""Reading a plan: settings merged and checked, references resolved, kinds compared, before anything runs.

    load(document, sets, stages) -> Plan       behind `plan.load_plan`
    code_of(stage class, its settings) -> {file: sha256}

Every refusal names file and line, what was expected, what stands above, and what mends it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from . import secrets
from .artifacts import KINDS, Artifact, sha256_file
from .config import (
    Document,
    Keys,
    Places,
    Settings,
    absolute_path_value,
    absolute_paths,
    assign,
    closest,
    merge,
    nearest,
    parse_set,
    parse_settings,
    unknown_keys,
)
from .errors import UserError
from .launch import launch_settings
from .modules import digests
from .plan import Plan, Ref, Row, Source
from .stage import Slot, Stage, load_stage, slots_in, slots_out
from .store import ROW_NAME

PACKAGE = Path(__file__).resolve().parents[1]
CODE = (".py", ".c")  # files whose content is part of what a row is computed with
WORLD = "pipeline.data.world_stage:WorldStage"
TOP = ("name", "description", "seed", "skip_bad", "launch", "sources", "rows", "stages", "settings")
SETTABLE = ("seed", "skip_bad", "launch", "sources", "stages", "settings")
SOURCE_KINDS = (
    "documents",
    "conversations",
    "comparisons",
    "rated",
    "prompts",
    "samples",
    "tokenizer",
    "policy",
    "reward_model",
)
SEEDS = 2**63  # signed 64-bit numbers, without the negative ones that numpy refuses


def load(document: Document, sets: Sequence[str], stages: Mapping[str, str]) -> Plan:
    return _Loading(document.path, dict(document.values), document.places, dict(stages)).plan(sets)


class _SourceSettings(Settings):
    """A file source. `part: [0.9, 1]` takes the records whose prompts fall into that share of all prompts;
    `same: pairs` reads the files of another source, where none are given."""

    kind: Literal[
        "documents",
        "conversations",
        "comparisons",
        "rated",
        "prompts",
        "samples",
        "tokenizer",
        "policy",
        "reward_model",
    ]
    path: str | list[str] | None = None
    same: str | None = None
    format: str | None = None
    part: tuple[float, float] | None = None
    base: str | None = None

    @field_validator("part")
    @classmethod
    def _within(cls, part: tuple[float, float] | None) -> tuple[float, float] | None:
        if part is not None and not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part: [low, high] with 0 <= low < high <= 1, not {list(part)}")
        return part


class _Loading:
    """The steps of `load`, which share the document and where its keys stand."""

    def __init__(self, path: Path, values: dict[str, Any], places: Places, stages: dict[str, str]) -> None:
        self.path, self.values, self.places, self.stages = path, values, places, stages
        self.kinds: dict[str, tuple[type[Artifact], ...]] = {}  # what stands above: reference -> kinds
        self.withheld: set[str] = set()  # outputs that rows above leave out by their settings
        self.classes: dict[str, type[Stage]] = {}
        self.carried: dict[str, Any] = {}  # row -> what its stage says of its model

    def plan(self, sets: Sequence[str]) -> Plan:
        self._check_top()
        names = self._row_names()
        self._apply_sets(sets, names)
        secrets.require_none(self.values)
        self._require_finite(self.values, ())
        seed = self._seed(("seed",), self._typed("seed", int, 0))
        launch_settings(self._typed("launch", dict, {}), self.places)
        sources = self._file_sources()
        rows = [self._world_row(name) for name in self._worlds()]
        self._check_settings_names(names)
        for index, name in enumerate(names):
            rows.append(self._row(index, name, seed, names))
        return Plan(
            path=self.path,
            name=self._typed("name", str, self.path.stem),
            seed=seed,
            launch=self._typed("launch", dict, {}),
            skip_bad=self._typed("skip_bad", bool, False),
            rows=rows,
            sources=sources,
            document={**self.values, "seed": seed},
        )

    def _require_finite(self, value: Any, keys: Keys) -> None:
        """Also where settings take any value: a record of the plan is JSON, which has no such numbers."""
        if isinstance(value, float) and not math.isfinite(value):
            raise self._fail(keys, f"{'.'.join(keys)}: expected a finite number, found {value}")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            self._require_finite(item, (*keys, str(key)))

    def _fail(self, keys: Keys, message: str) -> UserError:
        place = self.places.of(keys[0], keys[1:]) if keys else ""
        return UserError(f"{place or f'{self.path}: '}{message}")

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._fail((key,), f"{key}: expected {kind.__name__}, found {value!r}")
        return value

    def _seed(self, keys: Keys, seed: int) -> int:
        if not 0 <= seed < SEEDS:
            raise self._fail(keys, f"{'.'.join(keys)}: expected a number from 0 to {SEEDS - 1}, found {seed}")
        return seed

    def _mapping(self, *keys: str) -> dict[str, Any]:
        value: Any = self.values
        for key in keys:
            value = value.get(key)
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise self._fail(keys, f"{'.'.join(keys)}: expected a mapping, found {value!r}")
        return dict(value)

    # ----------------------------------------------------------------------------------------- the document

    def _check_top(self) -> None:
        for key in self.values:
            if key not in TOP:
                where = "; settings of all its rows stand under `stages`, of one row under `settings`"
                known = where if key.partition("@")[0] in self.stages else nearest(key, TOP)
                raise self._fail((key,), f"unknown key {key!r}{known}")

    def _row_names(self) -> list[str]:
        rows = self.values.get("rows")
        if not isinstance(rows, list) or not rows:
            raise self._fail(("rows",), "rows: expected a list of rows, such as `- sft: {policy: pretrain.policy}`")
        names: list[str] = []
        for index, entry in enumerate(rows):
            keys = ("rows", str(index))
            if not isinstance(entry, dict) or len(entry) != 1:
                raise self._fail(keys, f"row {index + 1}: expected one `name: {{inputs}}`, found {entry!r}")
            name = next(iter(entry))
            if not ROW_NAME.fullmatch(name):
                raise self._fail(keys, f"row {name!r}: a row is called STAGE or STAGE@LABEL, the label [a-z0-9-]+")
            if name in names:
                raise self._fail(keys, f"row {name!r} stands twice; call the second {name.partition('@')[0]}@2")
            if name.partition("@")[0] not in self.stages:
                stage = name.partition("@")[0]
                raise self._fail(keys, f"row {name!r}: there is no stage {stage!r}{nearest(stage, self.stages)}")
            names.append(name)
        return names

    def _apply_sets(self, sets: Sequence[str], names: list[str]) -> None:
        parsed = [(text, *parse_set(text)) for text in sets]
        for text, keys, value in sorted(parsed, key=lambda item: item[1][0] != "stages"):  # one row beats its stage
            value = absolute_path_value(keys[-1], absolute_paths(value, Path.cwd()), Path.cwd())
            for target in self._targets(text, keys, names):
                assign(self.values, target, value, f"--set {text}")
                self.places.put(target, f"--set {text}")

    def _targets(self, text: str, keys: Keys, names: list[str]) -> list[Keys]:
        """Where in the document a `--set` goes. A stage-wide one also overrides the rows in the file."""
        first, sources = keys[0], [name for name in self._mapping("sources") if name not in SETTABLE]
        if first in (*names, *sources) and len(keys) == 1:
            named = "KEY=VALUE" if first in (*names, *self._worlds()) else "path=FILE"
            raise UserError(f"--set {text}: {first!r} holds settings; name one of them: --set {first}.{named}")
        if first in names:
            return [("settings", *keys)]
        if first in sources:
            return [("sources", *keys)]
        if first == "name":
            raise UserError(f"--set {text}: a run is named by --name, or by `name:` in the plan file")
        if first not in SETTABLE:
            valid = [*SETTABLE, *names, *sources]
            raise UserError(
                f"--set {text}: {first!r} is no row, no source and no part of a plan{nearest(first, valid)}"
            )
        rows = [name for name in names if first == "stages" and len(keys) > 2 and name.partition("@")[0] == keys[1]]
        rows = [name for name in rows if _holds(self._mapping("settings").get(name), keys[2:])]
        return [keys, *(("settings", name, *keys[2:]) for name in rows)]

    # ---------------------------------------------------------------------------------------------- sources

    def _worlds(self) -> list[str]:
        sources = self._mapping("sources")
        return [name for name, value in sources.items() if isinstance(value, dict) and value.get("kind") == "world"]

    def _file_sources(self) -> dict[str, Source]:
        sources = {}
        for name, value in self._mapping("sources").items():
            keys = ("sources", name)
            if not ROW_NAME.fullmatch(name) or "@" in name:
                raise self._fail(keys, f"sources.{name}: a source is called [a-z0-9_-]+")
            if not isinstance(value, dict):
                raise self._fail(keys, f"sources.{name}: expected {{kind: ..., path: ...}}, found {value!r}")
            if value.get("kind") == "world":
                continue
            self._check_kind(name, value)
            sources[name] = _source(name, parse_settings(_SourceSettings, value, f"sources.{name}", self.places))
            self.kinds[name] = (sources[name].kind,)
        sources = {name: self._shared(source, sources) for name, source in sources.items()}
        for source in sources.values():
            self._check_bases(source, sources)
        return sources

    def _check_bases(self, source: Source, sources: Mapping[str, Source]) -> None:
        """Every `base:` on the way down is a source, and none comes back to one above it."""
        chain = [source.name]
        while (base := sources[chain[-1]].base) is not None:
            keys = ("sources", chain[-1], "base")
            if base not in sources:
                raise self._fail(keys, f"no source is called {base!r}{nearest(base, sources)}")
            if base in chain:
                words = " -> ".join([*chain, base])
                raise self._fail(keys, f"sources.{chain[-1]}.base: a model cannot be its own base ({words})")
            chain.append(base)

    def _shared(self, source: Source, sources: Mapping[str, Source]) -> Source:
        """The source itself, or with the files of the one that it names by `same`; a path of its own wins."""
        if source.same is None:
            return source
        keys, other = ("sources", source.name, "same"), sources.get(source.same)
        if other is None:
            raise self._fail(keys, f"no source of files is called {source.same!r}{nearest(source.same, sources)}")
        if other.same is not None:
            end = f"{source.same!r} itself reads the files of {other.same!r}; name a source with a path"
            raise self._fail(keys, f"sources.{source.name}.same: {end}")
        if source.paths:
            return replace(source, same=None)
        return replace(source, paths=other.paths, listed=other.listed, format=source.format or other.format)

    def _check_kind(self, name: str, value: dict[str, Any]) -> None:
        if value.get("kind") is None:
            others = [other for other in self._mapping("sources") if other != name]
            known = nearest(name, others)
            raise self._fail(("sources", name), f"sources.{name}: no kind is given: a new source needs one{known}")
        if value.get("kind") not in SOURCE_KINDS:
            kinds = ["world", *SOURCE_KINDS]
            known = nearest(str(value.get("kind")), kinds)
            raise self._fail(("sources", name, "kind"), f"sources.{name}.kind: {value.get('kind')!r} is none{known}")

    def _world_row(self, name: str) -> Row:
        values = {key: value for key, value in self._mapping("sources", name).items() if key != "kind"}
        target = self.stages.get("world", WORLD)
        cls = self._load_class(target)
        seed = values.get("seed", 0)
        if "seed" not in cls.Config.model_fields:
            values.pop("seed", None)
        config = parse_settings(cls.Config, values, f"sources.{name}", self.places)
        self._stands(name, cls, config)
        seed = self._seed(("sources", name, "seed"), int(getattr(config, "seed", seed)))
        return Row(name, "world", target, cls, config, {}, seed, code_of(cls, config))

    # ------------------------------------------------------------------------------------------------- rows

    def _row(self, index: int, name: str, seed: int, names: list[str]) -> Row:
        stage = name.partition("@")[0]
        if name in self._mapping("sources"):
            raise self._fail(("rows", str(index)), f"row {name!r}: a source has this name; give one another name")
        cls = self._load_class(self.stages[stage])
        label = f"settings.{name}"
        self.places.also[label] = (("settings", name), ("stages", stage))
        values = merge(self._mapping("stages", stage), self._mapping("settings", name))
        config = parse_settings(cls.Config, values, label, self.places)
        inputs = self._wire(index, name, cls, names)
        try:
            cls.check(config, frozenset(slot for slot, value in inputs.items() if value))
            cls.check_names(config, {slot: _names(value) for slot, value in inputs.items()})
            starts = {
                slot: self.carried.get(value.row or "") for slot, value in inputs.items() if isinstance(value, Ref)
            }
            self.carried[name] = cls.carried(config, starts)
        except UserError as error:
            raise self._fail(("rows", str(index)), f"row {name}: {error}") from error
        self._stands(name, cls, config)
        return Row(name, stage, self.stages[stage], cls, config, inputs, seed, code_of(cls, config))

    def _load_class(self, target: str) -> type[Stage]:
        if target not in self.classes:
            self.classes[target] = load_stage(target)
        return self.classes[target]

    def _stands(self, row: str, cls: type[Stage], config: Settings) -> None:
        without = cls.withheld(config)
        self.withheld |= {f"{row}.{slot}" for slot in without}
        self.kinds.update({f"{row}.{s.name}": s.kinds for s in slots_out(cls).values() if s.name not in without})

    def _check_settings_names(self, names: list[str]) -> None:
        for name, value in self._mapping("settings").items():
            if name not in names and value is not None:
                raise self._fail(("settings", name), f"settings.{name}: there is no such row{nearest(name, names)}")
        for stage in self._mapping("stages"):
            if stage not in self.stages:
                raise self._fail(("stages", stage), f"stages.{stage}: no such stage{nearest(stage, self.stages)}")
            if all(name.partition("@")[0] != stage for name in names):
                config = self._load_class(self.stages[stage]).Config
                unknown_keys(config, self._mapping("stages", stage), f"stages.{stage}", self.places)

    def _wire(self, index: int, row: str, cls: type[Stage], names: list[str]) -> dict[str, Ref | list[Ref] | None]:
        given, slots = self._row_inputs(index, row), slots_in(cls)
        for slot in given:
            if slot not in slots:
                keys = ("rows", str(index), row, slot)
                raise self._fail(keys, f"row {row}: there is no input {slot!r}{nearest(slot, slots)}")
        return {name: self._input(index, row, slot, given.get(name), names) for name, slot in slots.items()}

    def _row_inputs(self, index: int, row: str) -> dict[str, Any]:
        given = self.values["rows"][index][row]
        if given is not None and not isinstance(given, dict):
            raise self._fail(("rows", str(index)), f"row {row}: expected {{input: row.output}}, found {given!r}")
        return given or {}

    def _input(self, index: int, row: str, slot: Slot, value: Any, names: list[str]) -> Ref | list[Ref] | None:
        keys = ("rows", str(index), row, slot.name)
        start = f"row {row}, input {slot.name}: expects {slot.expects}"
        if value is None or value == []:
            if slot.optional:
                return None
            raise self._fail(keys, f"{start}, but nothing is given; {self._candidates(slot)}")
        if slot.one_will_do and not isinstance(value, list):
            value = [value]
        if isinstance(value, list) != slot.many:
            example = f"write [{value}]" if slot.many else "write one reference, not a list"
            raise self._fail(keys, f"{start}, but is {value!r}; {example}")
        refs = [self._ref(keys, start, slot, row, item, names) for item in (value if slot.many else [value])]
        if len({ref.text for ref in refs}) != len(refs):
            raise self._fail(keys, f"row {row}, input {slot.name}: names something twice: {', '.join(value)}")
        return refs if slot.many else refs[0]

    def _ref(self, keys: Keys, start: str, slot: Slot, row: str, text: Any, names: list[str]) -> Ref:
        if not isinstance(text, str):
            raise self._fail(keys, f"{start}, but is {text!r}; a reference is text such as sft.policy")
        if text not in self.kinds:
            above = text.partition(".")[0]
            below = above in names and not any(known.startswith(f"{above}.") for known in self.kinds)
            words = f"{above!r} does not stand above it" if below else f"nothing above is called {text!r}"
            words = f"{text} is left out by the settings of row {above}" if text in self.withheld else words
            close = closest(text, self.kinds) if not below and text not in self.withheld else ""
            raise self._fail(keys, f"{start}; {words}{close}; {self._candidates(slot)}")
        kinds = self.kinds[text]
        if not set(kinds) <= set(slot.kinds):
            names_found = " or ".join(kind.__name__ for kind in kinds)
            raise self._fail(keys, f"{start}, but {text} is {names_found}; {self._candidates(slot)}")
        above, dot, output = text.partition(".")
        return Ref(text, above, output) if dot else Ref(text, source=text)

    def _candidates(self, slot: Slot) -> str:
        fits = [text for text, kinds in self.kinds.items() if set(kinds) <= set(slot.kinds)]
        if fits:
            return f"of that kind stand above: {', '.join(fits)}"
        everything = ", ".join(f"{text} ({kinds[0].__name__})" for text, kinds in self.kinds.items())
        return f"nothing of that kind stands above, only: {everything}" if everything else "nothing stands above"


def _source(name: str, values: _SourceSettings) -> Source:
    listed = isinstance(values.path, list)
    paths = values.path if isinstance(values.path, list) else [values.path] if values.path else []
    files = tuple(Path(p) for p in paths)
    return Source(name, KINDS[values.kind], files, listed, values.format, values.part, values.base, values.same)


def _names(refs: Ref | list[Ref] | None) -> list[str]:
    """The rows, or sources, that an input reads."""
    several = refs if isinstance(refs, list) else [refs] if refs else []
    return [ref.row or ref.text for ref in several]


def _holds(value: Any, keys: Iterable[str]) -> bool:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def code_of(cls: type[Stage], config: Settings) -> dict[str, str]:
    """{file: sha256} of the sources that a stage declares, of its own file and of its base classes, and of the modules
    that its settings name."""
    files: dict[str, Path] = {}
    for part in cls.sources:
        inside = (path for path in (PACKAGE / part).rglob("*") if path.suffix in CODE)
        found = sorted(inside) if (PACKAGE / part).is_dir() else [PACKAGE / part]
        files.update({path.relative_to(PACKAGE).as_posix(): path for path in found})
    for owner in cls.__mro__:
        if issubclass(owner, Stage) and owner is not Stage and (own := sys.modules[owner.__module__].__file__):
            name = owner.__module__.removeprefix(f"{PACKAGE.name}.").replace(".", "/")
            files[f"{name}.py"] = Path(own)
    hashes = {name: sha256_file(path) for name, path in sorted(files.items())}
    return hashes | digests(config.modules_named())
