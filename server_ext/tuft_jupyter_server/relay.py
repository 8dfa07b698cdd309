"""The panel's routes on a JupyterHub with a shared service: what runs there is shown, not what this server could run.

Every request is passed on with the user's Hub token, which never reaches the browser; Jupyter's identity, XSRF check
and authorizer guard these routes as those of :mod:`~tuft_jupyter_server.lab`. Whose runs are shown, and what may
be done with them, the service decides: a user sees their own, an admin of the Hub everybody's. Knows the service by its
API only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.iostream import StreamClosedError

from tuft_jupyter.core.types import JSON
from tuft_jupyter.wire.archive import CHUNK
from tuft_jupyter.wire.routes import Route
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.lab import LabExport, LabFeed, LabRead
from tuft_jupyter_server.lab_calls import OPENAI, TINKER, rules
from tuft_jupyter_server.uploads import LabUpload, Spool

log = logging.getLogger("tuft_jupyter.relay")

API = {TINKER: "/api/v1", OPENAI: "/oai/api/v1"}
"""Below what a path of the lab is found at the service."""
ASKED, ANSWERED = ("Content-Type", "Accept"), ("content-type", "content-disposition", "retry-after")
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 3600.0
SILENT_SECONDS = 60.0
"""The service tells its load each second: one that says nothing for so long is gone."""
LAGS = 256
"""Messages that a slow panel may lag behind before it must fetch the state anew."""


class Unreachable(web.HTTPError):
    """The service does not answer; the panel shows the reason (``problem``)."""

    def __init__(self, service: HubService, why: object) -> None:
        super().__init__(502, f"the Hub's fine-tuning service at {service.address} cannot be reached: {why}")


@dataclass(frozen=True, slots=True)
class HubService:
    """Where the shared service is, and the user's key for it."""

    address: str
    key: str = field(repr=False)

    async def ask(self, path: str, **options: Any) -> HTTPResponse:
        """One request, whatever its status; Unreachable if there is none."""
        headers = {**options.pop("headers", {}), "X-API-Key": self.key}
        request = HTTPRequest(
            self.address + path,
            headers=headers,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=ANSWER_SECONDS,
            follow_redirects=False,
            allow_nonstandard_methods=True,
            **options,
        )
        try:
            return await _client().fetch(request, raise_error=False)
        except (OSError, HTTPClientError) as error:
            raise Unreachable(self, error) from None

    async def events(self, path: str) -> AsyncGenerator[bytes, None]:
        """The data of server-sent events, until the service ends them. A reader that lags is told to ``resync``."""
        waiting: deque[bytes] = deque()
        arrived, rest = asyncio.Event(), b""

        def heard(chunk: bytes) -> None:
            nonlocal rest
            *whole, rest = (rest + chunk).split(b"\n\n")
            waiting.extend(event.removeprefix(b"data: ") for event in whole)
            if len(waiting) > LAGS:
                waiting.clear()
                waiting.append(b'{"type":"resync"}')
            arrived.set()

        def ended(listening: asyncio.Future[None]) -> None:
            if not listening.cancelled() and (problem := listening.exception()):
                log.info("%s", problem)
            arrived.set()

        listening = asyncio.ensure_future(self._listen(path, heard))
        listening.add_done_callback(ended)
        try:
            while waiting or not listening.done():
                await arrived.wait()
                arrived.clear()
                while waiting:
                    yield waiting.popleft()
        finally:
            listening.cancel()

    async def _listen(self, path: str, heard: Callable[[bytes], None]) -> None:
        """By a client that hangs up when it is cancelled: Tornado's would listen on, to what nobody reads."""
        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        headers = {"X-API-Key": self.key}
        try:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=timeout) as client,
                client.stream("GET", self.address + path, headers=headers) as answer,
            ):
                async for chunk in answer.aiter_bytes():
                    heard(chunk)
        except httpx.HTTPError as error:
            raise Unreachable(self, error) from None


@functools.cache
def _client() -> AsyncHTTPClient:
    """One for all requests of this process.

    What is long is passed on as it comes, so it may be of any length.
    """
    return AsyncHTTPClient(force_instance=True, max_clients=200, max_body_size=2**50)


class RelayRead(LabRead):
    """A request that is answered as the service answers it."""

    def initialize(self, service: HubService) -> None:  # type: ignore[override]
        self.service = service

    async def pass_on(self, path: str, **options: Any) -> None:
        """Send the answer's status, its telling headers and its body, as they come."""

        def line(text: str) -> None:
            name, _, value = text.strip().partition(": ")
            if name.startswith("HTTP/"):
                self.set_status(int(name.split()[1]))
            elif name.lower() in ANSWERED:
                self.set_header(name, value)

        def chunk(data: bytes) -> asyncio.Future[None]:
            self.write(data)
            # the next one is read when this one has left (by tornado 6.6 and later)
            return asyncio.ensure_future(self._taken())

        try:
            await self.service.ask(path, header_callback=line, streaming_callback=chunk, **options)
        except Unreachable as problem:
            if self._headers_written:  # what was cut off must not look whole
                self.detach().close()
                return
            self.set_status(502)
            self.write(json.dumps({"problem": problem.log_message, "message": problem.log_message}))
        self.finish(set_content_type=self._headers.get("Content-Type", JSON))

    async def _taken(self) -> None:
        """What was written has left for the browser, or there is none any more."""
        with contextlib.suppress(StreamClosedError):
            await self.flush()


class RelayState(RelayRead):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self.pass_on("/api/v1/tuft/state?tenant=*")


class RelayExport(LabExport):
    def initialize(self, service: HubService) -> None:  # type: ignore[override]
        self.service = service

    async def columns(self, run: str) -> dict[str, list[float | None]] | None:
        answer = await self.service.ask(f"/api/v1/tuft/runs/{quote(run, safe='')}/curve")
        return json.loads(answer.body)["columns"] if answer.code == 200 else None


class RelayFeed(LabFeed):
    def initialize(self, service: HubService) -> None:  # type: ignore[override]
        self.service = service
        self._telling = None

    def messages(self, since: int | None) -> AsyncGenerator[bytes, None]:
        known = "" if since is None else f"&since={since}"
        return self.service.events(f"/api/v1/tuft/feed?tenant=*{known}")


class RelayCall(RelayRead):
    """One path of the table. The service says itself what is wrong with a request."""

    def initialize(self, service: HubService, routes: Mapping[str, Route]) -> None:  # type: ignore[override]
        super().initialize(service)
        self.routes = routes

    @property
    def content_security_policy(self) -> str:
        return f"{super().content_security_policy}; sandbox"

    @web.authenticated
    @authorized
    async def get(self, **parts: str) -> None:
        await self._call()

    @web.authenticated
    @authorized
    async def post(self, **parts: str) -> None:
        await self._call()

    @web.authenticated
    @authorized
    async def put(self, **parts: str) -> None:
        await self._call()

    @web.authenticated
    @authorized
    async def delete(self, **parts: str) -> None:
        await self._call()

    async def _call(self) -> None:
        headers = {name: self.request.headers[name] for name in ASKED if name in self.request.headers}
        body = self.request.body or None
        await self.pass_on(path_there(self), method=self.request.method, headers=headers, body=body)


class RelayUpload(LabUpload):
    """A large body, spooled here as it comes, then sent on."""

    def initialize(self, service: HubService, host: Host, route: Route) -> None:  # type: ignore[override]
        super().initialize(host, route)
        self.service = service

    async def keep(self, spool: Spool) -> None:
        async def produce(write: Callable[[bytes], Awaitable[None]]) -> None:
            spool.file.seek(0)
            while chunk := await asyncio.to_thread(spool.file.read, CHUNK):
                await write(chunk)

        headers = {"Content-Type": "application/x-tar", "Content-Length": str(spool.size)}
        answer = await self.service.ask(
            path_there(self), method="POST", headers=headers, body_producer=produce
        )
        self.set_status(answer.code)
        self.finish(answer.body, set_content_type=answer.headers.get("Content-Type", JSON))


def path_there(handler: web.RequestHandler) -> str:
    """What was asked for, as the service has it."""
    uri = handler.request.uri or ""
    for ours, theirs in API.items():
        _, found, rest = uri.partition(f"/tuft{ours}/")
        if found:
            return f"{theirs}/{rest}"
    raise web.HTTPError(404)


def handlers(root: str, host: Host, service: HubService) -> list[tuple[str, Any, dict[str, Any]]]:
    """``host`` is this server's own: its limits and its disk hold an upload on its way."""
    shared = {"service": service}
    return [
        (root + "/lab/state", RelayState, shared),
        (root + "/lab/export", RelayExport, shared),
        (root + "/lab/feed", RelayFeed, shared),
        *(
            (path, kind, {**options, "host": host} if kind is RelayUpload else options)
            for path, kind, options in rules(root, RelayCall, RelayUpload, shared)
        ),
    ]
