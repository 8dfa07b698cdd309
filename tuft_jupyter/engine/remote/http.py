"""One server elsewhere, as HTTP sees it: requests, what they fail with, and whether it is there at all.

The client is httpx. Addresses are asked as they are given, never through a proxy. It knows no protocol: what an answer
means is its caller's business. Promises: what does not connect fails within :data:`CONNECT_SECONDS`; an error names the
address that was tried and the command that tries it by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
PROBE_SECONDS = 5.0
"""Between two looks at whether a server is there."""
SILENT_SECONDS = 1800.0
"""Without a byte of an answer, after which a request counts as lost."""
TRIES = (0.5, 1.0, None)
"""Seconds between the tries of a start."""

Value = TypeVar("Value")


class Unreachable(Exception):
    """Nobody answers at an address, or the connection broke; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a server is to its users: how errors call it, the paths that show its health, and how to start one."""

    name: str
    health: Sequence[str]
    advice: str


class Reply:
    """A whole answer: ``status``, ``body``, ``content_type``."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.body = response.content
        self.content_type = response.headers.get("content-type", "")

    def json(self) -> Any:
        """The body's value, None if it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def error(self) -> str:
        """What the server says is wrong, in one line."""
        value = self.json()
        found = (
            value.get("error") or value.get("detail") or value.get("message")
            if isinstance(value, dict)
            else None
        )
        if isinstance(found, dict):
            found = found.get("message")
        text = found if isinstance(found, str) else self.body[:300].decode(errors="replace")
        return " ".join(text.split())[:500] or f"HTTP {self.status}"


async def lines(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The lines of an answer as they come. httpx's own would end one at a U+2028 or U+0085 of a JSON text, too."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode()
    if rest:
        yield rest.decode()


class Server:
    """One address. ``state`` is "" before the first look, then "reachable" or "unreachable"; ``detail`` says why.

    ``on_return`` is called when one that was unreachable is there.
    """

    def __init__(
        self, kind: Kind, url: str, key: str = "", workers: ThreadPoolExecutor | None = None
    ) -> None:
        self.kind, self.url, self._key = kind, url, key
        self.state, self.detail = "", ""
        self.on_return: Callable[[], None] = lambda: None
        self._workers = workers
        self._client: httpx.AsyncClient | None = None

    async def ask(
        self, method: str, path: str, body: Any = None, *, seconds: float = SILENT_SECONDS, **headers: str
    ) -> Reply:
        """One request; ``body`` is bytes, or a value to be sent as JSON. Unreachable if there is no answer."""
        content = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        try:
            timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
            response = await self._http().request(
                method, self.url + path, content=content, headers=self._headers(headers), timeout=timeout
            )
        except httpx.RequestError as error:
            raise self._lost(error) from None
        return Reply(response)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncGenerator[httpx.Response, None]:
        """A POST whose answer is read as it comes. Leaving the block ends the request."""
        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with self._http().stream(
                "POST",
                self.url + path,
                content=msgspec.json.encode(body),
                headers=self._headers({}),
                timeout=timeout,
            ) as response:
                yield response
        except httpx.RequestError as error:
            raise self._lost(error) from None

    async def download(self, url: str, target: Path) -> int:
        """Write what lies at an address, which carries its own permission, to a file; its size in bytes."""
        size = 0
        try:
            async with self._http().stream("GET", url, timeout=SILENT_SECONDS) as response:
                if response.status_code != 200:
                    raise Unreachable(f"GET of a file at {self.url} answers {response.status_code}")
                with target.open("xb") as file:
                    async for chunk in response.aiter_bytes(2**20):
                        size += await self.work(file.write, chunk)
                    await self.work(os.fsync, file.fileno())
        except httpx.RequestError as error:
            raise self._lost(error) from None
        return size

    async def probe(self) -> bool:
        """Look whether the server is there and says it is well; ``state`` and ``detail`` follow."""
        cause = ""
        for path in self.kind.health:
            try:
                reply = await self.ask("GET", path, seconds=CONNECT_SECONDS)
            except Unreachable as error:
                self._note(str(error))
                return False
            if reply.ok:
                self._note("")
                return True
            cause = f"GET {path} answers {reply.status}"
        self._note(self.unreachable(cause))
        return False

    async def found(self) -> bool:
        """The same, tried a few times."""
        for pause in TRIES:
            if await self.probe():
                return True
            if pause is not None:
                await asyncio.sleep(pause)
        return False

    async def work(self, call: Callable[..., Value], *arguments: Any) -> Value:
        """Run what would hold up the event loop in one of the ``workers`` (None: the event loop's own threads)."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, call, *arguments)

    def shown(self) -> dict[str, str]:
        """As the status has it."""
        return {
            "name": self.kind.name,
            "url": self.url,
            "state": self.state or "unknown",
            "detail": self.detail,
        }

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def unreachable(self, cause: str) -> str:
        """In one line, what is tried, what came of it and what to do."""
        health = f"{self.url}{self.kind.health[-1]}"
        return (
            f"{self.kind.name} can't be reached at {self.url} ({cause}). Look whether it is running: curl {health} . "
            f"{self.kind.advice}"
        )

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            trusted = ssl.create_default_context()  # by this machine or SSL_CERT_FILE, as in kernels
            self._client = httpx.AsyncClient(trust_env=False, verify=trusted, limits=limits)
        return self._client

    def _headers(self, more: dict[str, str]) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers |= {"Authorization": f"Bearer {self._key}", "X-API-Key": self._key}
        return headers | {name.replace("_", "-"): value for name, value in more.items()}

    def _lost(self, error: httpx.RequestError) -> Unreachable:
        text = " ".join(str(error).split())
        return Unreachable(self.unreachable(text or type(error).__name__))

    def _note(self, problem: str) -> None:
        state = "unreachable" if problem else "reachable"
        if state != self.state:
            (log.warning if problem else log.info)(
                "%s at %s: %s", self.kind.name, self.url, problem or "reachable"
            )
        returned = self.state == "unreachable" and not problem
        self.state, self.detail = state, problem
        if returned:
            self.on_return()


async def watch(servers: Sequence[Server]) -> None:
    """Look at servers for ever, so that their ``state`` follows what they are."""
    while True:
        await asyncio.gather(*(server.probe() for server in servers))
        await asyncio.sleep(PROBE_SECONDS)
