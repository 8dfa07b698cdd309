"""The OpenAPI document: all of the table, nothing but the table, and schemas that hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from tuft_jupyter.wire.openapi import TABLES, document
from tuft_jupyter.wire.routes import Access

DOCUMENT = json.loads(msgspec.json.encode(document("http://somewhere/tuft")))
METHODS = {"get", "post", "put", "delete"}


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_row_of_the_tables_is_in_the_document_and_nothing_else() -> None:
    listed = {(root + route.path, route.method.lower()) for root, table in TABLES for route in table}
    assert {(path, method) for path, item in DOCUMENT["paths"].items() for method in item} == listed


def test_operations_have_names_of_their_own_and_say_who_is_answered() -> None:
    """S1-24: a key is needed where the table says so."""
    names = []
    for root, table in TABLES:
        for route in table:
            operation = DOCUMENT["paths"][root + route.path][route.method.lower()]
            names.append(operation["operationId"])
            assert operation["summary"] == route.doc
            assert ("security" in operation) == (route.access is not Access.KEY)
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert all("{" + name + "}" in route.path for name in named)
            assert route.path.count("{") == len(named)
    assert len(names) == len(set(names))


def test_every_reference_leads_to_a_valid_schema() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for reference in references(DOCUMENT):
        assert reference.removeprefix("#/components/schemas/") in schemas
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("name", "body", "fits"),
    [
        ("CreateSession", {"tags": ["a"], "sdk_version": "0.38.0"}, True),
        ("CreateSession", {"tags": "a"}, False),
        ("ChatCompletion", {"model": "m", "messages": [{"role": "user", "content": "x"}]}, True),
        ("ChatCompletion", {"model": "m"}, False),
        ("CreateModel", {"session_id": "s", "model_seq_id": 0, "base_model": "b"}, False),
    ],
)
def test_schemas_tell_good_bodies_from_bad_ones(name: str, body: Any, fits: bool) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    assert Draft202012Validator(schema).is_valid(body) == fits
