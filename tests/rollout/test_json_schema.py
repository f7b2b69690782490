"""JSON Schema: what is accepted, and what is refused before anything is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.rollout.json_schema import KEYWORDS, Schema

TREE = {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"}
CASES: list[tuple[Any, list[Any], list[Any]]] = [  # schema, valid values, invalid values
    (True, [None, 1, {}], []),
    (False, [], [None, 1, {}]),
    ({}, [None, 1, {}, []], []),
    ({"type": "integer"}, [3, -1, 3.0], [3.5, True, "3", None]),
    ({"type": "number"}, [3, 3.5], [True, "3", float("inf")]),
    ({"type": ["string", "null"]}, ["x", None], [1, False]),
    ({"type": "boolean"}, [True], [1, 0]),
    ({"enum": [1, "a", None, [1]]}, [1, 1.0, "a", None, [1]], [True, 2, [True], "b"]),
    ({"const": {"a": 1}}, [{"a": 1}, {"a": 1.0}], [{"a": True}, {}, {"a": 1, "b": 2}]),
    ({"required": ["a"]}, [{"a": 1}, "no object"], [{}, {"b": 1}]),
    ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "x"}, {"b": 1}], [{"a": 1}]),
    ({"properties": {"a": True}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
    ({"additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "x"}]),
    ({"propertyNames": {"maxLength": 1}}, [{"a": 1}], [{"ab": 1}]),
    ({"minProperties": 1, "maxProperties": 2}, [{"a": 1}], [{}, {"a": 1, "b": 1, "c": 1}]),
    ({"dependentRequired": {"a": ["b"]}}, [{}, {"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
    ({"items": {"type": "integer"}}, [[], [1, 2]], [[1, "x"]]),
    ({"prefixItems": [{"const": 1}], "items": {"const": 2}}, [[], [1], [1, 2, 2]], [[2], [1, 1]]),
    ({"minItems": 1, "maxItems": 2}, [[1], "no list"], [[], [1, 2, 3]]),
    ({"contains": {"const": 7}}, [[1, 7]], [[], [1]]),
    ({"uniqueItems": True}, [[1, True, "1"], [[1], [2]]], [[1, 1.0], [{"a": [1]}, {"a": [1]}]]),
    ({"uniqueItems": False}, [[1, 1]], []),
    ({"minimum": 1, "maximum": 2}, [1, 2, 1.5, "3"], [0, 2.5]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 2}, [1.5], [1, 2]),
    ({"multipleOf": 0.1}, [0.3, 1, 0], [0.35]),  # 0.3 % 0.1 is 0.0999... in floating point
    ({"minLength": 1, "maxLength": 2}, ["a", "äö"], ["", "abc"]),
    ({"pattern": "^a+$"}, ["aa", 3], ["ab"]),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, [2], [0, 4]),
    ({"anyOf": [{"const": 1}, {"const": 2}]}, [1, 2], [3]),
    ({"oneOf": [{"minimum": 1}, {"minimum": 3}]}, [2], [0, 4]),
    ({"not": {"type": "null"}}, [1], [None]),
    ({"if": {"minimum": 10}, "then": {"multipleOf": 10}, "else": {"const": 1}}, [1, 20], [2, 15]),
    ({"if": {"const": 1}}, [1, 2], []),
    (TREE, [{}, {"next": {"next": {}}}], [{"next": {"next": 1}}, 3]),
    ({"$schema": "x", "title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c"}, [1], []),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=lambda x: json.dumps(x)[:40])
def test_values_by_schema(schema: Any, valid: list[Any], invalid: list[Any]):
    made = Schema(schema)
    assert [v for v in valid if not made.accepts(v)] == []
    assert [v for v in invalid if made.accepts(v)] == []


def test_every_keyword_that_is_read_is_tested():
    def keys(schema: Any) -> set[str]:
        inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        return {*(schema if isinstance(schema, dict) else []), *(k for s in inner for k in keys(s))}

    assert set().union(*(keys(schema) for schema, _, _ in CASES)) >= KEYWORDS


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"format": "date"}, "schema.format: this keyword is not read; read are"),
        ({"properties": {"a": {"typ": "string"}}}, "schema.properties.a.typ: this keyword is not read"),
        ({"anyOf": [{}, {"type": "text"}]}, r"schema.anyOf\[1\].type: expected of null, boolean"),
        ({"type": [["string"]]}, "schema.type: expected of"),
        ({"minLength": -1}, "schema.minLength: expected a count"),
        ({"multipleOf": 0}, "schema.multipleOf: expected a number"),
        ({"minimum": True}, "schema.minimum: expected a number"),
        ({"enum": []}, "schema.enum: expected a list that is not empty"),
        ({"required": "a"}, "schema.required: expected a list of names"),
        ({"dependentRequired": {"a": "b"}}, "schema.dependentRequired: expected an object of lists"),
        ({"properties": []}, "schema.properties: expected an object of schemas"),
        ({"pattern": "("}, "schema.pattern: '\\(' is no regular expression"),
        ({"uniqueItems": 1}, "schema.uniqueItems: expected true or false"),
        ({"items": 3}, "schema.items: expected an object, true or false"),
        ({"$ref": "#/$defs/x"}, r"schema.\$ref: expected #/\$defs/NAME"),
        ({"$ref": "http://x/y"}, r"schema.\$ref: expected"),
        ({"items": {"$defs": {}}}, r"schema.items.\$defs: \$defs are read at the top only"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "refers to itself without going into the value"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"not": {"$ref": "#/$defs/a"}}}}, "refers to itself"),
    ],
)
def test_what_is_not_read_is_refused(schema: Any, message: str):
    """A keyword that is passed over would accept what the author meant to refuse."""
    with pytest.raises(ValueError, match=message):
        Schema(schema)
