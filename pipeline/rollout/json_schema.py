"""JSON Schema (draft 2020-12), the part of it that a model's answer is checked against.

    schema = Schema({"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}})
    schema.accepts({"name": "Mira"})      # True

Read: type, enum, const; properties, required, additionalProperties, propertyNames, minProperties, maxProperties,
dependentRequired; items, prefixItems, contains, minItems, maxItems, uniqueItems; minimum, maximum, exclusiveMinimum,
exclusiveMaximum, multipleOf; minLength, maxLength, pattern; allOf, anyOf, oneOf, not, if, then, else; $ref to
"#/$defs/NAME", and the boolean schemas. Annotations ($schema, $comment, title, description, default, examples) say
nothing about validity. Every other keyword is refused when the schema is made, never passed over in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from pipeline.rollout.patterns import Pattern

REF = "#/$defs/"
TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: _is_number(v),
    "integer": lambda v: _is_number(v) and v == int(v),  # 1.0 is an integer
}
ANNOTATIONS = {"$schema", "$comment", "title", "description", "default", "examples"}

# keyword -> what its value must be; these are also what makes a check out of it
COUNTS = {"minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
ONE = {"additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else"}
SEVERAL = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"properties", "$defs"}
IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else"}  # applied to the same value
OTHER = {"type", "enum", "const", "required", "dependentRequired", "uniqueItems", "pattern", "$ref"}
KEYWORDS = COUNTS | BOUNDS | ONE | SEVERAL | NAMED | OTHER | ANNOTATIONS


class Schema:
    """A schema that was found readable. Raises ValueError naming the place and what is wrong with it."""

    def __init__(self, schema: Any) -> None:
        self.root = schema
        definitions = schema.get("$defs") if isinstance(schema, dict) else None
        self.definitions: Mapping[str, Any] = definitions if isinstance(definitions, dict) else {}
        self.patterns: dict[str, Pattern] = {}
        self._check(schema, "schema")
        for name in self.definitions:
            self._follow(f"{REF}{name}", ())

    def accepts(self, value: Any) -> bool:
        """Whether a value, as `json.loads` gives it, is valid."""
        return self._accepts(self.root, value)

    # ------------------------------------------------------------------------------------ reading the schema

    def _check(self, schema: Any, at: str) -> None:
        if isinstance(schema, bool):
            return
        _need(isinstance(schema, dict), at, "expected an object, true or false")
        for key, value in schema.items():
            here = f"{at}.{key}"
            _need(key in KEYWORDS, here, f"this keyword is not read; read are {', '.join(sorted(KEYWORDS))}")
            _need(key != "$defs" or at == "schema", here, "$defs are read at the top only")
            self._check_value(key, value, here)
            for part, inner in _inner(key, value):
                self._check(inner, f"{here}{part}")

    def _check_value(self, key: str, value: Any, here: str) -> None:
        if key == "type":
            names = value if isinstance(value, list) else [value]
            _need(
                bool(names) and all(isinstance(n, str) and n in TYPES for n in names),
                here,
                f"expected of {', '.join(TYPES)}",
            )
        elif key in COUNTS:
            _need(isinstance(value, int) and not isinstance(value, bool) and value >= 0, here, "expected a count")
        elif key in BOUNDS:
            _need(_is_number(value) and (key != "multipleOf" or value > 0), here, "expected a number")
        elif key in SEVERAL or key == "enum":
            _need(isinstance(value, list) and bool(value), here, "expected a list that is not empty")
        elif key in NAMED:
            _need(isinstance(value, dict), here, "expected an object of schemas")
        elif key == "required":
            _need(_are_texts(value), here, "expected a list of names")
        elif key == "dependentRequired":
            lists = isinstance(value, dict) and all(_are_texts(names) for names in value.values())
            _need(lists, here, "expected an object of lists of names")
        elif key == "uniqueItems":
            _need(isinstance(value, bool), here, "expected true or false")
        elif key == "pattern":
            _need(isinstance(value, str), here, "expected a regular expression")
            try:
                self.patterns[value] = Pattern(value)
            except ValueError as error:
                raise ValueError(f"{here}: {error}") from error
        elif key == "$ref":
            known = isinstance(value, str) and value.startswith(REF) and value.removeprefix(REF) in self.definitions
            _need(known, here, f"expected {REF}NAME of a schema that stands under $defs")

    def _follow(self, ref: str, above: tuple[str, ...]) -> None:
        """Refuse definitions that come back to themselves on the same value: they would never end."""
        if ref in above:
            raise ValueError(f"schema: {' -> '.join((*above, ref))}: refers to itself without going into the value")
        for inner in _refs_in_place(self.definitions[ref.removeprefix(REF)]):
            self._follow(inner, (*above, ref))

    # -------------------------------------------------------------------------------------- checking a value

    def _accepts(self, schema: Any, value: Any) -> bool:
        if isinstance(schema, bool):
            return schema
        checks = [self._general, self._composed]
        if isinstance(value, dict):
            checks.append(self._object)
        elif isinstance(value, list):
            checks.append(self._array)
        elif isinstance(value, str):
            checks.append(self._string)
        elif _is_number(value):
            checks.append(self._number)
        return all(check(schema, value) for check in checks)

    def _general(self, schema: Mapping[str, Any], value: Any) -> bool:
        names = schema.get("type", list(TYPES))
        names = names if isinstance(names, list) else [names]
        return (
            any(TYPES[name](value) for name in names)
            and ("enum" not in schema or any(_same(value, other) for other in schema["enum"]))
            and ("const" not in schema or _same(value, schema["const"]))
        )

    def _composed(self, schema: Mapping[str, Any], value: Any) -> bool:
        fits = lambda inner: self._accepts(inner, value)
        if "$ref" in schema and not fits(self.definitions[schema["$ref"].removeprefix(REF)]):
            return False
        if "if" in schema and not fits(schema.get("then" if fits(schema["if"]) else "else", True)):
            return False
        return (
            all(map(fits, schema.get("allOf", [])))
            and ("anyOf" not in schema or any(map(fits, schema["anyOf"])))
            and ("oneOf" not in schema or sum(map(fits, schema["oneOf"])) == 1)
            and ("not" not in schema or not fits(schema["not"]))
        )

    def _object(self, schema: Mapping[str, Any], value: dict[str, Any]) -> bool:
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        dependent = schema.get("dependentRequired", {})
        return (
            _within(len(value), schema, "minProperties", "maxProperties")
            and all(name in value for name in schema.get("required", []))
            and all(name in value for key, names in dependent.items() if key in value for name in names)
            and all(self._accepts(schema.get("propertyNames", True), name) for name in value)
            and all(self._accepts(known.get(name, rest), item) for name, item in value.items())
        )

    def _array(self, schema: Mapping[str, Any], value: list[Any]) -> bool:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        unique = schema.get("uniqueItems", False)
        return (
            _within(len(value), schema, "minItems", "maxItems")
            and all(self._accepts(inner, item) for inner, item in zip(first, value, strict=False))
            and all(self._accepts(rest, item) for item in value[len(first) :])
            and ("contains" not in schema or any(self._accepts(schema["contains"], item) for item in value))
            and not (unique and any(_same(a, b) for i, a in enumerate(value) for b in value[:i]))
        )

    def _string(self, schema: Mapping[str, Any], value: str) -> bool:
        pattern = schema.get("pattern")
        fits = pattern is None or self.patterns[pattern].found_in(value) > 0
        return fits and _within(len(value), schema, "minLength", "maxLength")

    def _number(self, schema: Mapping[str, Any], value: int | float) -> bool:
        return (
            _within(value, schema, "minimum", "maximum")
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
            and ("multipleOf" not in schema or _exact(value) % _exact(schema["multipleOf"]) == 0)
        )


def _inner(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas inside a keyword's value, each with its place."""
    if key in ONE:
        yield "", value
    elif key in SEVERAL:
        yield from ((f"[{i}]", inner) for i, inner in enumerate(value))
    elif key in NAMED:
        yield from ((f".{name}", inner) for name, inner in value.items())


def _refs_in_place(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield schema["$ref"]
    for key in IN_PLACE & set(schema):
        for _, inner in _inner(key, schema[key]):
            yield from _refs_in_place(inner)


def _need(right: bool, at: str, expected: str) -> None:
    if not right:
        raise ValueError(f"{at}: {expected}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _within(size: float, schema: Mapping[str, Any], low: str, high: str) -> bool:
    return schema.get(low, size) <= size <= schema.get(high, size)


def _exact(value: int | float) -> Fraction:
    return Fraction(repr(value))  # 0.3 is three tenths here: a multiple of 0.1


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str) and not isinstance(b, str):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
