"""The route tables as one OpenAPI document (3.1): for client generators, explorers and fuzzers.

What a route answers is JSON unless said otherwise; refusals have one shape for each dialect. The document holds nothing
that is not in the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec

from tuft_jupyter._version import __version__
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire.messages import Message
from tuft_jupyter.wire.routes import OPENAI_ROUTES, ROUTES, Access, Dialect, Route

REFUSAL = {
    "type": "object",
    "required": ["detail", "error", "category"],
    "properties": {
        "detail": {"type": "string"},
        "error": {"type": "string"},
        "category": {"enum": ["user", "server"]},
    },
}
OPENAI_REFUSAL = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
TABLES: tuple[tuple[str, tuple[Route, ...]], ...] = (("/api/v1", ROUTES), ("/oai/api/v1", OPENAI_ROUTES))


def document(server: str) -> dict[str, Any]:
    """``server`` is the address above ``/api/v1``."""
    return {**_tables(), "servers": [{"url": server}]}


@cache
def _tables() -> dict[str, Any]:
    routes = [route for _, table in TABLES for route in table]
    messages = list({route.message for route in routes if route.message is not None})
    _, schemas = msgspec.json.schema_components(messages, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for root, table in TABLES:
        for route in table:
            paths.setdefault(root + route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tuft-jupyter",
            "version": __version__,
            "description": "The Tinker protocol, and OpenAI-compatible inference.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Refusal": REFUSAL, "OpenAIRefusal": OPENAI_REFUSAL},
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"key": []}, {"bearer": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    shape = "OpenAIRefusal" if route.dialect is Dialect.OPENAI else "Refusal"
    refused = {"description": "Refused.", "content": _content(JSON, f"#/components/schemas/{shape}")}
    operation: dict[str, Any] = {
        "operationId": route.endpoint,
        "summary": route.doc,
        "tags": [route.dialect.value],
        "parameters": [*_parameters(route)],
        "responses": {"200": {"description": "Done, or promised."}, "4XX": refused},
    }
    if route.access is not Access.KEY:
        operation["security"] = []
    body = _body(route)
    if body is not None:
        operation["requestBody"] = {"content": body, "x-max-bytes": route.max_body}
    return operation


def _parameters(route: Route) -> Iterable[dict[str, Any]]:
    for name in re.findall(r"\{(\w+)\}", route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name in re.findall(r"\?(\w+)=", route.doc):
        yield {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}


def _body(route: Route) -> dict[str, Any] | None:
    if route.message is not None:
        return _content(JSON, f"#/components/schemas/{_name(route.message)}")
    if route.endpoint in ("forward", "forward_backward"):
        return {PROTOBUF: _BINARY, **_content(JSON, None)}
    return {"application/octet-stream": _BINARY} if route.upload else None


def _content(media: str, reference: str | None) -> dict[str, Any]:
    return {media: {"schema": {"$ref": reference} if reference else {"type": "object"}}}


def _name(message: type[Message]) -> str:
    return message.__name__
