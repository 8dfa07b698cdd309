"""Write docs/api.md from the route table: ``python scripts/api_docs.py``. A test holds that it is current."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tuft_jupyter.wire.routes import BULK, MIB, OPENAI_ROUTES, ROUTES, Route

HEAD = """# API reference

<!-- Written by scripts/api_docs.py from tuft_jupyter/wire/routes.py. -->

The Tinker API, as the stock SDK calls it. All paths lie below `<base url>/tuft/api/v1` in a notebook server and
below `/api/v1` in a daemon. Send the key as `X-API-Key` (or `Authorization: Bearer`); cookies are ignored. A signed
path needs no key: it holds a permission that expires. A refusal is a JSON object `{"detail", "error", "category"}`:
401 without a key, 403 with one that is unknown or revoked, 404 for what is missing or somebody else's, 413 over the
size limit, 429 with `Retry-After` where a limit is reached for now, 400 for everything that the caller can mend.
What fails after it was accepted is answered by `retrieve_future` as `{"error", "category"}`. The same table, with the
schemas of all bodies, is served as an OpenAPI document at `/openapi.json`.

| method | path | what it does | access | body limit |
| --- | --- | --- | --- | --- |
"""

MIDDLE = """
Bodies of %d MiB at most may be set lower by `max_body_bytes`; uploads have `max_upload_bytes`.

## Request fields

JSON, unless a line says otherwise. Fields that are not listed are read over.

`forward_backward` (and `forward`, for old SDKs) take a protobuf body, see `tuft_jupyter/wire/tuft_wire.proto`; the
worker also reads the JSON of SDKs before 0.25.
"""

OPENAI = """
## OpenAI-compatible inference

Below `<base url>/tuft/oai/api/v1` in a notebook server and below `/oai/api/v1` in a daemon, with the same keys; below
`<base url>/tuft/lab/oai` for who is logged in to the notebook server. A refusal is OpenAI's
`{"error": {"message", "type", "param", "code"}}`. How to use it: [openai.md](openai.md).

| method | path | what it does | access | body limit |
| --- | --- | --- | --- | --- |
"""


def row(route: Route) -> str:
    return f"| {route.method} | `{route.path}` | {route.doc} | {route.access.value} | {route.max_body // MIB} MiB |\n"


def fields(route: Route) -> str:
    if route.message is None or not msgspec.structs.fields(route.message):
        return ""
    parts = [
        f"`{field.encode_name}`" + (" (required)" if field.required else "")
        for field in msgspec.structs.fields(route.message)
    ]
    return f"\n- **{route.method} `{route.path}`**: " + ", ".join(parts)


def text() -> str:
    listed = "".join(row(route) for route in ROUTES)
    bodies = "".join(fields(route) for route in ROUTES)
    openai = "".join(row(route) for route in OPENAI_ROUTES)
    openai_bodies = "".join(fields(route) for route in OPENAI_ROUTES)
    return HEAD + listed + MIDDLE % (BULK // MIB) + bodies + "\n" + OPENAI + openai + openai_bodies + "\n"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "api.md").write_text(text())
