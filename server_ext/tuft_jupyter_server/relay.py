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
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
from jupyter_server.auth.decorator import authorized
from tornado import web
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
ASKED = ("Content-Type", "Accept")
ANSWERED = {"content-type", "content-disposition", "retry-after", "cache-control", "x-accel-buffering"}
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 3600.0
SILENT_SECONDS = 60.0
"""The service tells its load each second: one that says nothing for so long is gone."""
LAGS = 256
"""Messages that a slow panel may lag behind before it must fetch the state anew."""


class Unreachable(web.HTTPError):
    """The service does not answer; the panel shows the reason (``problem``)."""

    def __init__(self, service: HubService, why: object) -> None:
        self.problem = f"the Hub's fine-tuning service at {service.address} cannot be reached: {why}"
        super().__init__(502, self.problem)


@dataclass(frozen=True, slots=True)
class HubService:
    """Where the shared service is, and the user's key for it."""

    address: str
    key: str = field(repr=False)

    @asynccontextmanager
    async def answer(
        self, path: str, method: str = "GET", **options: Any
    ) -> AsyncGenerator[httpx.Response, None]:
        """The answer to one request, whatever its status, its body still to be read; Unreachable if there is none.

        Whoever leaves the block before the end hangs up, and so ends what the service does for it.
        """
        headers = {**options.pop("headers", {}), "X-API-Key": self.key, "Accept-Encoding": "identity"}
        try:
            async with _client().stream(method, self.address + path, headers=headers, **options) as answer:
                if answer.has_redirect_location:
                    raise Unreachable(self, f"it redirects to {answer.headers['Location']}")
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(self, str(error) or type(error).__name__) from None

    async def ask(self, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        """The same, read to its end."""
        async with self.answer(path, method, **options) as answer:
            await answer.aread()
            return answer

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
        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        async with self.answer(path, timeout=timeout) as answer:
            if answer.status_code != 200:
                raise Unreachable(self, f"it answers {answer.status_code}")
            async for chunk in answer.aiter_raw():
                heard(chunk)


@functools.cache
def _client() -> httpx.AsyncClient:
    """One for all requests of this process. Each has a connection of its own: feeds stay open.

    Trusted is what kernels trust: what this machine or SSL_CERT_FILE vouches for.
    """
    return httpx.AsyncClient(
        trust_env=False,
        verify=ssl.create_default_context(),
        timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )


class RelayRead(LabRead):
    """A request that is answered as the service answers it."""

    def initialize(self, service: HubService) -> None:  # type: ignore[override]
        self.service = service
        self._passing: asyncio.Task[None] | None = None

    async def pass_on(self, path: str, **options: Any) -> None:
        """Send the answer's status, its telling headers and its body as they come, until the browser leaves."""
        self._passing = asyncio.ensure_future(self._pass_on(path, **options))
        with contextlib.suppress(asyncio.CancelledError):
            await self._passing

    def its_own(self, answer: httpx.Response) -> bool:
        """Whether an answer is for the browser, and not a sign that there is no service now."""
        return True

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._passing is not None:
            self._passing.cancel()

    async def _pass_on(self, path: str, **options: Any) -> None:
        try:
            async with self.service.answer(path, **options) as answer:
                if not self.its_own(answer):
                    await answer.aread()
                    raise Unreachable(self.service, f"it answers {answer.status_code}: {_words(answer)}")
                self.set_status(answer.status_code)
                for name in ANSWERED & answer.headers.keys():
                    self.set_header(name, answer.headers[name])
                async for chunk in answer.aiter_raw():
                    self.write(chunk)
                    await self.flush()  # the next one is read when this one has left
        except StreamClosedError:  # nobody is there any more
            return
        except Unreachable as error:
            if self._headers_written:  # what was cut off must not look whole
                self.detach().close()
                return
            self.set_status(502)
            self.set_header("Content-Type", JSON)
            self.write(json.dumps({"problem": error.problem, "message": error.problem}))
        self.finish(set_content_type=self._headers["Content-Type"])


class RelayState(RelayRead):
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self.pass_on("/api/v1/tuft/state?tenant=*")

    def its_own(self, answer: httpx.Response) -> bool:
        """From anything else the panel would take it that this server is away, or not set up."""
        return answer.status_code in (200, 401, 403)


class RelayExport(LabExport):
    def initialize(self, service: HubService) -> None:  # type: ignore[override]
        self.service = service

    async def columns(self, run: str) -> dict[str, list[float | None]] | None:
        answer = await self.service.ask(f"/api/v1/tuft/runs/{quote(run, safe='')}/curve")
        if answer.status_code not in (200, 404):
            raise web.HTTPError(answer.status_code, _words(answer))
        return answer.json()["columns"] if answer.status_code == 200 else None


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
        asked = self.request.headers
        headers = {name: asked[name].encode("latin1") for name in ASKED if name in asked}  # as they came
        body = self.request.body or None
        await self.pass_on(path_there(self), method=self.request.method, headers=headers, content=body)


class RelayUpload(LabUpload):
    """A large body, spooled here as it comes, then sent on."""

    def initialize(self, service: HubService, host: Host, route: Route) -> None:  # type: ignore[override]
        super().initialize(host, route)
        self.service = service

    async def keep(self, spool: Spool) -> None:
        async def chunks() -> AsyncGenerator[bytes, None]:
            spool.file.seek(0)
            while chunk := await asyncio.to_thread(spool.file.read, CHUNK):
                yield chunk

        headers = {"Content-Type": "application/x-tar", "Content-Length": str(spool.size)}
        answer = await self.service.ask(path_there(self), "POST", headers=headers, content=chunks())
        self.set_status(answer.status_code)
        self.finish(answer.content, set_content_type=answer.headers.get("Content-Type", JSON))


def _words(answer: httpx.Response) -> str:
    """Why the service refuses, as it says itself."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):  # a proxy's page
        return answer.reason_phrase


def path_there(handler: web.RequestHandler) -> str:
    """What was asked for, as the service has it."""
    uri = handler.request.uri or ""
    if not {".", ".."}.isdisjoint(uri.partition("?")[0].split("/")):
        raise web.HTTPError(404)  # on its way it would become another path
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
