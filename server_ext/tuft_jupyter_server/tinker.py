"""Tornado handlers of the Tinker API, one per path of the route table.

A handler authenticates by the ``X-API-Key`` header alone (also ``Authorization: Bearer``); cookies are ignored, so a
page of another site can do nothing here and XSRF tokens are not needed. It refuses oversized bodies while they arrive,
undoes zstd within the same limit, keeps uploads in a file, and gives everything else to
:class:`tuft_jupyter.wire.api.Api`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import zstandard
from jupyter_server.auth.decorator import allow_unauthenticated
from tornado.web import HTTPError, stream_request_body

from tuft_jupyter.core.access import TOKEN_PREFIX, ActiveKey, KeyRing
from tuft_jupyter.core.errors import (
    Elsewhere,
    NotFound,
    TooLarge,
    TuftError,
    UnsupportedMedia,
    UserError,
)
from tuft_jupyter.core.types import JSON, Principal
from tuft_jupyter.wire.api import Api, Call, error_reply
from tuft_jupyter.wire.endpoints.base import ANYTHING
from tuft_jupyter.wire.routes import (
    OPENAI_ROUTES,
    ROUTES,
    UPLOAD,
    Access,
    Dialect,
    Route,
)
from tuft_jupyter_server.base_handler import BaseHandler
from tuft_jupyter_server.logs import begin_request
from tuft_jupyter_server.uploads import Spool

if TYPE_CHECKING:
    from tuft_jupyter_server.host import Host

log = logging.getLogger("tuft_jupyter.http")

API = "/api/v1"

BODY_SECONDS, UPLOAD_SECONDS = 120.0, 3600.0
"""How long a body may take to arrive: who sends a byte a second does not keep a connection for ever."""


@stream_request_body
class TinkerHandler(BaseHandler):
    """One path. ``routes`` maps its methods; an empty map is a path that we do not have.

    ``mount`` is where the table begins, below whatever a proxy puts before it; ``parts`` are those of the route's path
    that this path does not spell out.
    """

    def initialize(
        self,
        api: Api,
        keys: KeyRing,
        routes: Mapping[str, Route],
        max_body: int,
        dialect: Dialect,
        max_upload: int = UPLOAD,
        mount: str = API,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        self.dialect = dialect
        self.mount = mount + "/"
        self.parts = parts or {}
        self.api = api
        self.keys = keys
        self.routes = routes
        self.max_body = max_body
        self.max_upload = max_upload
        self.principal = Principal("")
        self.credential = ""
        self.key: ActiveKey | None = None
        self.known_path = next((route.path for route in routes.values()), "unknown path")
        self._chunks: list[bytes] = []
        self._size = 0
        self._spool: Spool | None = None

    def check_xsrf_cookie(self) -> None:
        """Nothing to check: only a header that other sites cannot set gives access."""

    def set_default_headers(self) -> None:
        self.set_header("Server", "tuft-jupyter")
        self.set_header("X-Content-Type-Options", "nosniff")
        # Caches know that `Authorization` makes an answer private; of `X-API-Key` they know nothing (RFC 9111, 3.5)
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        self.set_header("X-Request-Id", begin_request(self.request.headers.get("X-Request-Id")))
        try:
            await self.recovered()
            self.route = await self._route()
            if self.route.access is Access.KEY:
                await self._authenticate()
            self.limit = self.max_upload if self.route.upload else min(self.route.max_body, self.max_body)
            announced = self.request.headers.get("Content-Length", "0")
            if announced.isdecimal() and int(announced) > self.limit:
                raise self._too_large(int(announced))
            self.request.connection.set_body_timeout(  # type: ignore[union-attr]
                UPLOAD_SECONDS if self.route.upload else BODY_SECONDS
            )
            if self.route.upload:
                self._spool = Spool(self.api.service.checkpoints.root, self.limit)
                self.request.connection.set_max_body_size(self.limit + 1)  # type: ignore[union-attr]
        except Elsewhere as other:
            self.set_header("Location", other.address + self._below())
            self.send(error_reply(other, self.dialect))
        except TuftError as error:
            self.send(error_reply(error, self.dialect))

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self._size += len(chunk)
        if self._spool is not None:
            self._spool.write(chunk)
        elif self._size <= self.limit:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()
        return None

    @allow_unauthenticated
    async def get(self, **parts: str) -> None:
        await self._serve_while_good(parts)

    @allow_unauthenticated
    async def post(self, **parts: str) -> None:
        await self._serve_while_good(parts)

    @allow_unauthenticated
    async def put(self, **parts: str) -> None:
        await self._serve_while_good(parts)

    @allow_unauthenticated
    async def delete(self, **parts: str) -> None:
        await self._serve_while_good(parts)

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._spool is not None:
            self._spool.break_off()

    def on_finish(self) -> None:
        super().on_finish()
        if self._spool is not None:
            self._spool.close()

    async def _serve_while_good(self, parts: Mapping[str, str]) -> None:
        """Serve, and break off when the caller's key ends, also where a poll is parked or bytes are on their way."""
        if self.key is None:
            await self._serve(parts)
            return
        try:
            key = await self._authenticate()  # again: the body may have taken an hour to arrive
        except TuftError as error:
            self.send(error_reply(error, self.dialect))
            return
        with key.in_use(self._key_ended):
            await self._serve(parts)

    async def _authenticate(self) -> ActiveKey:
        presented = self._key()
        self.key = key = await self.keys.authenticate(presented)
        self.principal = key.principal
        self.credential = "" if not presented or presented.startswith(TOKEN_PREFIX) else key.digest
        return key

    def _key_ended(self, why: TuftError) -> None:
        if self._working is asyncio.current_task():
            return  # the request that gives up its own key is told so
        self.refused = why
        if self._headers_written:
            self.request.connection.stream.close()  # type: ignore[union-attr]
        elif self._working is not None:
            self._working.cancel()

    async def _serve(self, parts: Mapping[str, str]) -> None:
        try:
            headers = self.request.headers
            call = Call(
                self.principal,
                {**self.parts, **parts},
                self._query(),
                self._body(),
                headers.get("Content-Type", JSON),
                headers.get("Accept", ANYTHING),
                self._root(),
                self.credential,
                None if self._spool is None else self._spool.file,
                headers.get("traceparent", ""),
            )
        except TuftError as error:
            self.send(error_reply(error, self.dialect))
            return
        await self.answer(self.route, call)

    async def _route(self) -> Route:
        route = self.routes.get(self.request.method or "")
        if route is not None:
            return route
        await self.keys.authenticate(self._key())
        what = f"{self.request.method} {self.request.path}"
        if self.routes:
            raise UserError(f"{what}: this path answers {', '.join(self.routes)}")
        raise NotFound(f"{what}: there is no such path; the API is described in the documentation")

    def _key(self) -> str | None:
        headers = self.request.headers
        bearer = headers.get("Authorization", "")
        return headers.get("X-API-Key") or (bearer[7:].strip() if bearer[:7].lower() == "bearer " else None)

    def _query(self) -> dict[str, str]:
        try:
            return {name: self.get_query_argument(name) for name in self.request.query_arguments}
        except HTTPError:
            raise UserError("the query string is not UTF-8: percent-encode it as UTF-8") from None

    def _body(self) -> bytes:
        if self._size > self.limit:
            raise self._too_large(self._size)
        if self._spool is not None:
            self._spool.check(self.route.path)
        body = b"".join(self._chunks)
        self._chunks.clear()
        encoding = self.request.headers.get("Content-Encoding", "identity").lower()
        if encoding == "identity":
            return body
        if encoding != "zstd" or self._spool is not None:
            raise UnsupportedMedia(f"Content-Encoding {encoding!r} is not read here: send zstd or nothing")
        return self._decompressed(body)

    def _decompressed(self, body: bytes) -> bytes:
        try:
            with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body) as reader:
                plain: bytes = reader.read(self.limit + 1)
        except zstandard.ZstdError as error:
            raise UserError(
                f"the body is not valid zstd ({error}): compress it again, or leave Content-Encoding out"
            ) from None
        if len(plain) > self.limit:
            raise self._too_large(len(plain))
        return plain

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(
            f"the body has {size} bytes or more, the limit of {self.route.path} is {self.limit}: "
            "send fewer datums per request"
        )

    def _root(self) -> str:
        """Ours, as the client spells it: a proxy may have put a prefix before it. No id holds a slash."""
        prefix, _, _ = self.request.path.rpartition(self.mount)
        return f"{self.request.protocol}://{self.request.host}{prefix}{self.mount.rstrip('/')}"

    def _below(self) -> str:
        """What was asked for, as it is below the address of any server like this one."""
        prefix, _, rest = (self.request.uri or "").partition(self.mount)
        return f"{'/oai' if prefix.endswith('/oai') else ''}{API}/{rest.removeprefix(API[1:] + '/')}"

    def _log(self) -> None:
        """No access log: a poll that is held is no event. Of the path only what the table says of it: the rest names
        what is a tenant's own, and the path of a download is its permission."""
        log.debug("%s %s %s", self.get_status(), self.request.method, self.known_path)


Rule = tuple[str, type[TinkerHandler], dict[str, Any]]


def rules(base: str, host: Host) -> list[Rule]:
    """All that a host answers to who has a key, below ``base`` (a pattern).

    Below the prefix of every application the table is as well, with and without the ``/api/v1`` that the SDK puts after
    an address. At the prefix itself is what the application is. A path of the table at ``/api/v1`` goes before those,
    and they before what there is nothing at.
    """
    settings = host.settings
    limit, upload = settings.max_body_bytes, settings.max_upload_bytes
    *found, nothing = handlers(base + API, host.api, host.keys, limit, upload)
    nowhere = [nothing]
    told = {"GET": next(each for each in ROUTES if each.endpoint == "applications")}
    for app in settings.applications:
        at = base + re.escape(app.route_prefix)
        if app.import_path != "server":
            shared = {**nothing[2], "routes": told, "parts": {"application": app.name}}
            found.append((at + "/?$", TinkerHandler, shared))
        if app.route_prefix != API:
            below = f"{at}(?:{API})?"
            *more, nothing_there = handlers(below, host.api, host.keys, limit, upload, app.route_prefix)
            found += more
            nowhere.append(nothing_there)
    found += nowhere
    found += openai_handlers(f"{base}/oai{API}", host.api, host.keys, limit)
    return found + metrics_handler(base + "/metrics", host.api, host.keys, limit)


def handlers(
    root: str, api: Api, keys: KeyRing, max_body: int, max_upload: int = UPLOAD, mount: str = API
) -> list[Rule]:
    """Tornado rules for the whole table below ``root`` (ending in ``mount``), and for what it does not have."""
    shared = {"api": api, "keys": keys, "max_body": max_body, "max_upload": max_upload, "mount": mount}
    shared["dialect"] = Dialect.TINKER
    return _rules(root, ROUTES, shared)


def metrics_handler(path: str, api: Api, keys: KeyRing, max_body: int) -> list[Rule]:
    """``/tuft/metrics`` of the table under the short path that scrapers are given."""
    route = next(each for each in ROUTES if each.endpoint == "metrics")
    shared = {"api": api, "keys": keys, "max_body": max_body, "dialect": Dialect.TINKER}
    return [(path, TinkerHandler, {**shared, "routes": {route.method: route}})]


def openai_handlers(root: str, api: Api, keys: KeyRing, max_body: int) -> list[Rule]:
    """The same for OpenAI-compatible inference, below a root of its own."""
    shared = {"api": api, "keys": keys, "max_body": max_body, "dialect": Dialect.OPENAI}
    return _rules(root, OPENAI_ROUTES, shared)


def _rules(root: str, table: Sequence[Route], shared: dict[str, Any]) -> list[Rule]:
    by_path: dict[str, dict[str, Route]] = {}
    for route in table:
        by_path.setdefault(route.pattern, {})[route.method] = route
    rules: list[Rule] = [
        (root + pattern, TinkerHandler, {**shared, "routes": routes}) for pattern, routes in by_path.items()
    ]
    rules.append((root + "/.*", TinkerHandler, {**shared, "routes": {}}))
    return rules
