"""Settings: from YAML and `--set` to validated, frozen values whose identity is known.

    class Settings                        base of every settings class; .identity() -> dict, .modules_named() -> tuple
    not_identity(default, description)    a field that does not decide the result, such as a token budget
    added(default, description)           a field that is younger than sealed rows: no part of identity at its default
    module_names(description)             a field that lists Python modules whose source decides the result
    parse_settings(cls, values, label, where) -> Settings      UserError: key, place, nearest valid key
    load_document(path) -> Document       `extends` merged, `path:` keys made absolute, duplicate keys refused
    with_sets(document, sets) -> Document                      `--set` applied literally
    parse_set(text) -> (keys, value)      "dpo.beta=0.2" -> (("dpo", "beta"), 0.2)
    assign(document, keys, value, label), merge(below, above)
    refused(key, words)                   what a validator of several settings raises about one of them
    nearest(key, valid) -> str            "; did you mean 'beta'?" or the list of what is valid

The YAML is a subset without surprises: true and false are the only booleans, 1e-4 is a number, dates text;
anchors, tags, duplicate keys and deep nesting are refused with their line.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import pydantic
import yaml
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import UserError

Keys = tuple[str, ...]
S = TypeVar("S", bound="Settings")
UNKNOWN, REFUSED = "unknown_key", "refused"  # types of our own errors, whose context holds the keys they are about
NO_NUMBER = object()
MOST_BYTES = 2**20  # of a plan file; the YAML reader takes ten seconds for that
MOST_LEVELS = 64  # of nesting in a plan
MOST_DIGITS = 400  # of a number; Python refuses to write down whole numbers of more than 4,300


class Settings(pydantic.BaseModel):
    """Frozen values; refused are unknown keys, numbers that are not finite, and booleans for numbers."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            valid = list(cls.model_fields)
            unknown = [str(key) for key in values if key not in valid]
            if unknown:
                words = "; ".join(f"unknown key {key!r}{cls._inside(key) or nearest(key, valid)}" for key in unknown)
                raise PydanticCustomError(UNKNOWN, "{words}", {"words": words, "keys": unknown})
            return cls._without_booleans(cls._over_defaults(values))
        return values

    @classmethod
    def _inside(cls, key: str) -> str:
        """The end of an error message where a group inside this one has a key of that name."""
        for name, info in cls.model_fields.items():
            groups = [kind for kind in _kinds(info.annotation) if isinstance(kind, type) and issubclass(kind, Settings)]
            if any(key in group.model_fields for group in groups):
                return f"; did you mean '{name}.{key}'?"
        return ""

    @classmethod
    def _over_defaults(cls, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """A mapping for a nested group changes those keys of the field's own default, and no others.

        A mapping that names another member of a union (another value of its Literal tag) starts from nothing.
        """
        out = dict(values)
        for name, info in cls.model_fields.items():
            default, given = info.default, out.get(name)
            if isinstance(default, Settings) and isinstance(given, Mapping) and not _another_tag(default, given):
                out[name] = merge(default.model_dump(exclude_unset=True), given)
        return out

    @classmethod
    def _without_booleans(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """pydantic takes true for 1, and 1, "yes" or "off" for booleans: NO_NUMBER stands in and is refused in their
        place."""
        numbers = {name for name, info in cls.model_fields.items() if _takes_numbers(info.annotation)}
        switches = {n: set(_words(f.annotation)) for n, f in cls.model_fields.items() if _takes_switches(f.annotation)}
        out = {name: _no_number(value) if name in numbers else value for name, value in values.items()}
        for name in switches.keys() & out.keys():
            odd = isinstance(out[name], (int, float, str)) and not isinstance(out[name], bool)
            out[name] = NO_NUMBER if odd and out[name] not in switches[name] else out[name]
        return out

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON: every field at every depth, without those made by `not_identity` and
        those made by `added` that are at their default."""
        return dict(_identity(self, self.model_dump(mode="json")))

    def modules_named(self) -> tuple[str, ...]:
        """Every module in a field made by `module_names`, at every depth."""
        return tuple(sorted(set(_modules(self))))


def _kinds(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of, and the values of a Literal by their types."""
    yield hint if isinstance(hint, type) or hint is Any else type(hint)
    for part in get_args(hint):
        yield from _kinds(part)


def _takes_numbers(hint: Any) -> bool:
    kinds = set(_kinds(hint))
    return bool(kinds & {int, float}) and not kinds & {bool, Any}


def _takes_switches(hint: Any) -> bool:
    kinds = set(_kinds(hint))
    return bool in kinds and not kinds & {int, float, Any}


def _words(hint: Any) -> Iterator[str]:
    """The texts among the values of a Literal."""
    for part in get_args(hint):
        yield from [part] if isinstance(part, str) else _words(part)


def _no_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_no_number(item) for item in value]
    return NO_NUMBER if isinstance(value, bool) else value


def _another_tag(default: Settings, given: Mapping[str, Any]) -> bool:
    """Whether it names another member of a union: a tag is a Literal of one value, not one of several words."""
    hints = {name: info.annotation for name, info in type(default).model_fields.items()}
    tags = [name for name, hint in hints.items() if get_origin(hint) is Literal and len(get_args(hint)) == 1]
    return any(name in given and given[name] != getattr(default, name) for name in tags)


def not_identity(default: Any = ..., description: str = "", **checks: Any) -> Any:
    """A field that is recorded but not part of a fingerprint. `checks` are pydantic's (gt, le)."""
    extra: Any = {"identity": False}
    return pydantic.Field(default, description=description, json_schema_extra=extra, **checks)


def added(default: Any, description: str, **checks: Any) -> Any:
    """A field that is part of a fingerprint only where it is not at its default, which must mean what was done before
    there was the field: rows that were sealed then keep their identity. `checks` are pydantic's (gt, le)."""
    extra: Any = {"added": True}
    return pydantic.Field(default, description=description, json_schema_extra=extra, **checks)


def module_names(description: str) -> Any:
    """A field that lists importable modules: the digest of their source enters a row's fingerprint."""
    extra: Any = {"modules": True}
    return pydantic.Field((), description=description, json_schema_extra=extra)


def _modules(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        for name, info in type(value).model_fields.items():
            named = (info.json_schema_extra or {}).get("modules", False)  # type: ignore[union-attr]
            yield from getattr(value, name) if named else _modules(getattr(value, name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _modules(item)
    elif isinstance(value, Mapping):
        yield from _modules(list(value.values()))


def _decides(info: pydantic.fields.FieldInfo, value: Any) -> bool:
    extra: Any = info.json_schema_extra or {}
    return extra.get("identity", True) and not (extra.get("added", False) and value == info.default)


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, pydantic.BaseModel):
        return {
            name: _identity(getattr(value, name), dumped[name])
            for name, info in type(value).model_fields.items()
            if _decides(info, getattr(value, name))
        }
    if isinstance(value, (list, tuple)):
        return [_identity(v, d) for v, d in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {str(key): _identity(v, dumped[str(key)]) for key, v in value.items()}
    return dumped


def refused(key: str, words: str) -> PydanticCustomError:
    """What a validator of a whole group raises: the message is about this key of it."""
    return PydanticCustomError(REFUSED, "{words}", {"words": words, "keys": [key]})


def nearest(key: str, valid: Iterable[str]) -> str:
    """The end of an error message: the valid name most like `key`, else all of them."""
    names = sorted(valid)
    return closest(key, names) or (f"; valid: {', '.join(names)}" if names else "")


def closest(key: str, valid: Iterable[str]) -> str:
    """The same, or nothing where none is like `key`."""
    close = difflib.get_close_matches(key, list(valid), 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# --------------------------------------------------------------------------------------- validated settings


def parse_settings(cls: type[S], values: Mapping[str, Any], label: str, where: Places | None = None) -> S:
    """`values` as a `cls`. `label` is what people call this group of settings ("settings.dpo").

    Every problem is reported at once, each with its key and, where `where` knows it, its file and line.
    """
    try:
        return cls.model_validate(dict(values))
    except pydantic.ValidationError as error:
        lines = [_problem(detail, values, label, where) for detail in error.errors(include_url=False)]
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def unknown_keys(cls: type[Settings], values: Mapping[str, Any], label: str, where: Places | None = None) -> None:
    """UserError for unknown keys only; values that are missing or of the wrong type pass."""
    try:
        cls.model_validate(dict(values))
    except pydantic.ValidationError as error:
        details = [d for d in error.errors(include_url=False) if d["type"] == UNKNOWN]
        if details:
            raise UserError("\n".join(_problem(d, values, label, where) for d in details)) from error


def _problem(detail: ErrorDetails, values: Any, label: str, where: Places | None) -> str:
    keys: list[str] = []
    for part in detail["loc"]:  # pydantic adds the tags of unions, which are no keys of the file
        inside = isinstance(values, Mapping) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            keys.append(str(part))
            values = values[part]  # type: ignore[index]
        elif detail["type"] == "missing" and part == detail["loc"][-1]:
            keys.append(str(part))
    if detail["type"] == REFUSED:
        keys.append(detail["ctx"]["keys"][0])
    if detail["type"] == "union_tag_invalid" and isinstance(values, Mapping):
        keys.append(tag := detail["ctx"]["discriminator"].strip("'"))
        values = values.get(tag)
    at = list(keys)
    if detail["type"] == UNKNOWN:
        at.append(detail["ctx"]["keys"][0])
    place = where.of(label, at) if where else ""
    return f"{place}{'.'.join([label, *keys])}: {_words_of(detail, values)}"


def _words_of(detail: ErrorDetails, given: Any) -> str:
    """What is wrong with the value given, in our words where pydantic's are of its own making."""
    context = detail.get("ctx", {})
    if expected := context.get("expected_tags") or (detail["type"] == "literal_error" and context["expected"]):
        close = closest(str(given), re.findall("'([^']+)'", expected))
        return f"expected {expected}, found {given!r}{close}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a mapping of settings, found {given!r}"
    message = detail["msg"].removeprefix("Value error, ")
    return message if detail["type"] == UNKNOWN or isinstance(given, Mapping) else f"{message} (given: {given!r})"


@dataclass
class Places:
    """Where every key of a document stands: keys -> "file:line" or "--set a.b"."""

    lines: dict[Keys, str] = field(default_factory=dict)
    also: dict[str, tuple[Keys, ...]] = field(default_factory=dict)  # label -> prefixes to look under

    def of(self, label: str, keys: Sequence[str] = ()) -> str:
        """ "file:line: " of the key, of a `--set` that made it by what lies below, or of the nearest mapping around it.

        "" where nothing is known.
        """
        prefixes = self.also.get(label, (tuple(label.split(".")),))
        near: list[Keys] = []
        for prefix in prefixes:
            whole = (*prefix, *keys)
            near += [whole, *(key for key in reversed(self.lines) if key[: len(whole)] == whole)]
        around = [(*prefix, *keys[:size]) for prefix in prefixes for size in range(len(keys) - 1, -1, -1)]
        return next((f"{self.lines[key]}: " for key in (*near, *around) if key in self.lines), "")

    def put(self, keys: Keys, place: str) -> None:
        """A value given anew at `place`: what stood below the old one stands nowhere now."""
        for key in [key for key in self.lines if key[: len(keys)] == keys]:
            del self.lines[key]
        self.lines[keys] = place


# ----------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader's scanner and parser with the scalars of YAML 1.2, without anchors."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "anchors and aliases are not read: put a shared part into `extends`",
                event.start_mark,
            )
        if self.level > MOST_LEVELS:
            words = f"nested too deeply, more than {MOST_LEVELS} levels"
            raise yaml.constructor.ConstructorError(None, None, words, event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML text and the line of every key. UserError names `name`:line."""
    lines: dict[Keys, int] = {}
    try:
        node = _Loader(text).get_single_node()
        return (_build(node, (), lines, name) if node is not None else None), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not YAML that can be read ({error})") from error


def _build(node: yaml.Node, keys: Keys, lines: dict[Keys, int], name: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(keys, line)
    if not isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in ("seq", "map"):
        raise UserError(f"{name}:{line}: the tag {node.tag} is not read; write a plain value")
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*keys, str(i)), lines, name) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, keys, lines, name)
    return _scalar(node, name)


def _build_mapping(node: yaml.MappingNode, keys: Keys, lines: dict[Keys, int], name: str) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            raise UserError(f"{name}:{line}: a key must be plain text")
        if key in built:
            first = lines[(*keys, key)]
            raise UserError(f"{name}:{line}: the key {key!r} stands twice (first in line {first}); keep one")
        lines[(*keys, key)] = line
        built[key] = _build(value_node, (*keys, key), lines, name)
    return built


def _scalar(node: yaml.Node, name: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    if len(digits) > MOST_DIGITS:
        raise UserError(f"{name}:{node.start_mark.line + 1}: a number of {len(digits)} digits is not read")
    if kind == "int":
        return int(digits, 16) if digits.lower().startswith("0x") else int(digits)
    if kind == "float":
        return float(re.sub(r"\.(inf|nan)", r"\1", digits.lower()))
    raise UserError(f"{name}:{node.start_mark.line + 1}: the tag {node.tag} is not read; write a plain value")


# ------------------------------------------------------------------------------------ documents and extends


@dataclass
class Document:
    """A plan file with everything that it extends merged in."""

    values: dict[str, Any]
    places: Places
    files: tuple[Path, ...]  # every file read, the plan itself last

    @property
    def path(self) -> Path:
        return self.files[-1]


def load_document(path: Path) -> Document:
    """Read `path` and all it extends; relative `path:` and `extends` values start at the file naming them."""
    return _load(Path(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> Document:
    own = path.resolve()
    if own in above:
        chain = " -> ".join(str(p.name) for p in (*above, own))
        raise UserError(f"{path}: extends itself ({chain}); take one of the lines out")
    values, lines = read_yaml(_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    extended = values.pop("extends", [])
    if not isinstance(extended, list) or not all(isinstance(item, str) for item in extended):
        raise UserError(f"{path}:{lines[('extends',)]}: `extends` is a list of files, such as [model/tiny.yaml]")
    merged, places, files = {}, {}, []  # type: dict[str, Any], dict[Keys, str], list[Path]
    for item in extended:
        target = path.parent / item
        if not target.is_file():
            raise UserError(f"{path}:{lines[('extends',)]}: extends {item!r}, but there is no file {target}")
        part = _load(target, (*above, own))
        merged = _merge_documents(merged, part.values)
        places.update(part.places.lines)
        files.extend(part.files)
    merged = _merge_documents(merged, absolute_paths(values, path.parent))
    places = {keys: place for keys, place in places.items() if _leads_somewhere(merged, keys)}  # a list was replaced
    places.update({keys: f"{path}:{line}" for keys, line in lines.items()})
    return Document(merged, Places(places), (*files, path))


def _leads_somewhere(values: Any, keys: Keys) -> bool:
    for key in keys:
        if isinstance(values, list) and key.isdigit() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return False
    return True


def _merge_documents(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A plan's `name` is no tag: a plan with another one still extends what stands below."""
    unnamed = {key: value for key, value in below.items() if key != "name" or key not in above}
    return dict(merge(unnamed, above))


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:  # also a pipe or a device, where the user names one
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path}: has more than {MOST_BYTES} bytes, which no plan has")
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def with_sets(document: Document, sets: Iterable[str]) -> Document:
    """The document with each `--set` assigned under its literal keys."""
    values, places = dict(document.values), Places(dict(document.places.lines), document.places.also)
    for text in sets:
        keys, value = parse_set(text)
        assign(values, keys, absolute_path_value(keys[-1], value, Path.cwd()), f"--set {text}")
        places.put(keys, f"--set {text}")
    return Document(values, places, document.files)


def merge(below: Any, above: Any) -> Any:
    """Mappings merge key by key, anything else is replaced; a mapping of another `kind` or `name` replaces all."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if any(tag in below and tag in above and below[tag] != above[tag] for tag in ("kind", "name")):
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(below[key], value) if key in below else value
    return merged


def absolute_paths(value: Any, folder: Path) -> Any:
    """`value` with every relative text under a key named `path` made absolute from `folder`."""
    if isinstance(value, list):
        return [absolute_paths(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: absolute_path_value(key, absolute_paths(item, folder), folder) for key, item in value.items()}


def absolute_path_value(key: str, value: Any, folder: Path) -> Any:
    if key != "path":
        return value
    if isinstance(value, list):
        return [absolute_path_value(key, item, folder) for item in value]
    if not isinstance(value, str):
        return value
    return os.path.abspath(folder / os.path.expanduser(value))


def parse_set(text: str) -> tuple[Keys, Any]:
    """ "dpo.beta=0.2" -> (("dpo", "beta"), 0.2). The value is YAML."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {text}: expected KEY.KEY=VALUE, such as --set dpo.beta=0.2")
    return keys, read_yaml(value, f"--set {text}")[0]


def assign(document: dict[str, Any], keys: Keys, value: Any, label: str) -> None:
    """Set `document[k0][k1]... = value`, making mappings on the way; UserError where a key holds none."""
    for key in keys[:-1]:
        inner = document.get(key)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"{label}: {key!r} holds {inner!r}, not a mapping, so nothing can be set below it")
        document[key] = dict(inner)
        document = document[key]
    document[keys[-1]] = value
