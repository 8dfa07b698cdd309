"""What every endpoint works with: the call, the reply, and the small conversions they share."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol

import msgspec

from tuft_jupyter.core.errors import Overloaded, TuftError, UserError
from tuft_jupyter.core.keys import KeyBook
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.types import JSON, ModelCard, Principal
from tuft_jupyter.wire.archive import Stream
from tuft_jupyter.wire.peek import base_type
from tuft_jupyter.wire.routes import Dialect
from tuft_jupyter.wire.tickets import Tickets

ANYTHING = "*/*"
EVENTS = "text/event-stream"
STREAMED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""What keeps a proxy from holding events back, or keeping them."""
OPENAI_ERRORS = {
    401: ("authentication_error", "missing_api_key"),
    403: ("permission_error", "invalid_api_key"),
    404: ("not_found_error", "model_not_found"),
    410: ("server_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
}
"""(type, code) by status."""

MIN_TTL, MAX_TTL = 1.0, 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who asks, the route's path parts and query, the body (decompressed), what may be answered.

    ``root`` is the API's address as the caller reached it, without a slash at the end; ``credential`` the digest of
    the caller's key, empty where a token stood for it; ``upload`` the body where it is kept in a file; ``trace`` the
    caller's ``traceparent``.
    """

    principal: Principal
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = JSON
    accept: str = ANYTHING
    root: str = ""
    credential: str = field(default="", repr=False)
    upload: BinaryIO | None = None
    trace: str = ""

    def accepts(self, media: str) -> bool:
        """Whether the caller reads this media type (RFC 9110, section 12.5.1; weights are not looked at)."""
        ranges = {base_type(part) for part in self.accept.split(",")}
        return not ranges.isdisjoint({media, media.split("/")[0] + "/*", ANYTHING})


@dataclass(frozen=True, slots=True)
class Reply:
    """``stream`` takes the place of ``body`` where that would be too large for memory."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Stream | None = None


def event_stream(events: AsyncGenerator[bytes, None]) -> Reply:
    """Server-sent events, each sent as it comes: ``data: ...``."""
    return Reply(b"", content_type=EVENTS, headers=STREAMED, stream=Stream(None, events))


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def reply(value: Any, status: int = 200) -> Reply:
    return Reply(msgspec.json.encode(value), status)


def error_reply(error: TuftError, dialect: Dialect = Dialect.TINKER) -> Reply:
    """``{"detail", "error", "category"}``: what the SDK shows, in one shape for every route; or OpenAI's shape."""
    headers = {"Retry-After": f"{math.ceil(error.retry_after)}"} if isinstance(error, Overloaded) else {}
    body: dict[str, Any] = {"detail": error.message, "error": error.message, "category": error.category}
    if dialect is Dialect.OPENAI:
        kind, code = OPENAI_ERRORS.get(error.status, ("invalid_request_error", None))
        body = {"error": {"message": error.message, "type": kind, "param": None, "code": code}}
    return Reply(msgspec.json.encode(body), error.status, headers=headers)


class Host(Protocol):
    """What the api asks of the server around it."""

    tickets: Tickets
    keybook: KeyBook

    @property
    def public_root(self) -> str:
        """The API's address for everybody, as the operator gave it; "": each caller's own words for it hold."""

    def status(self, principal: Principal) -> dict[str, Any]:
        """Readiness in words and numbers, as the lab and ``%tuft status`` show it."""

    async def recovered(self, seconds: float) -> None:
        """Return once the journal was read, so that what was there is known; Overloaded if it takes any longer.

        Elsewhere if another server serves it instead.
        """

    @property
    def serving(self) -> bool:
        """Whether requests are answered: the journal is read, and nothing stands in the way."""

    def metrics(self) -> tuple[bytes, str]:
        """Numbers for Prometheus, and their media type."""

    async def add_model(self, principal: Principal, model: str) -> ModelCard:
        """Offer one more base model and begin to load it."""

    async def measured(self) -> dict[str, Any]:
        """What the machine does: the newest measurement, not older than a second or two."""

    async def ray(self) -> dict[str, Any]:
        """The Ray that is up with its nodes, what is placed where, and the commands that start a cluster."""

    def live(
        self, principal: Principal, tenant: str | None, since: int | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What happens from now on, of one tenant or (None) of all, as messages for ``principal``; for ever.

        ``since`` is the number of the last record that the caller knows, if it knows any.
        """

    def tokenizer(self, card: ModelCard) -> dict[str, str]:
        """The model's tokenizer files by name, as text."""

    def words(self, card: ModelCard) -> Callable[[Sequence[int]], str | None]:
        """A function from token ids to text, or to None where the tokenizer cannot be read. Blocks a moment."""


class Endpoints:
    """A family of endpoints: each takes a :class:`Call` and returns a :class:`Reply`, or raises a TuftError."""

    service: Service
    host: Host
    hold_seconds: float


def checked_ttl(seconds: float | None) -> float | None:
    if seconds is not None and not MIN_TTL <= seconds <= MAX_TTL:
        raise UserError(
            f"ttl_seconds: {seconds} is outside {MIN_TTL:g}..{MAX_TTL:g} seconds (null keeps for ever)"
        )
    return seconds


def number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name}: {text!r} is not a whole number of at least 0")
    return int(text)


def page_of(items: Sequence[Any], query: Mapping[str, str], default: int) -> Sequence[Any]:
    offset = number(query, "offset", 0)
    return items[offset : offset + number(query, "limit", default)]


def cursor_of(query: Mapping[str, str], default: int, total: int) -> dict[str, int]:
    limit = number(query, "limit", default)
    return {"offset": number(query, "offset", 0), "limit": limit, "total_count": total}


def path_of(call: Call) -> str:
    """The checkpoint that a route's path names."""
    return f"tinker://{call.path['run']}/{call.path['kind']}/{call.path['name']}"


def urn_of(tenant: str) -> str:
    return f"tuft:tenant:{tenant}"


def iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
