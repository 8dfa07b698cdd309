"""How replies are sent: whole, or as a stream at the pace of the client.

The work for a request is cancelled when its client goes away, so no tokens are sampled for a closed connection. A
client that reads nothing for a minute counts as gone. It knows neither who asks nor what.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from tuft_jupyter.core.errors import ServerError, TuftError, UserError
from tuft_jupyter.wire.api import Api, Call, Reply, error_reply
from tuft_jupyter.wire.archive import Stream
from tuft_jupyter.wire.routes import Dialect, Route

log = logging.getLogger("tuft_jupyter.http")

TAKES_SECONDS = 60.0
"""How long a client may leave a chunk of a stream unread."""

AT_ONCE = ("healthz", "readyz", "status", "metrics")
"""What is answered while the journal is read, too."""


class BaseHandler(RequestHandler):
    """A handler that has the api answer; subclasses say who asks."""

    api: Api
    dialect = Dialect.TINKER
    refused: TuftError | None = None
    """Why the request was cancelled, if the client is to be told."""
    _working: asyncio.Task[None] | None = None

    def on_connection_close(self) -> None:
        """A client that went away is not waited for; an op it asked about goes on."""
        super().on_connection_close()  # nor is the rest of its body
        if self._working is not None:
            self._working.cancel()

    async def recovered(self) -> None:
        """Wait until the journal is read, as what it holds would seem to be gone; TuftError if that takes too long."""
        if self.request.path.rpartition("/")[2] not in AT_ONCE:
            await self.api.host.recovered(self.api.hold_seconds)

    async def answer(self, route: Route, call: Call) -> None:
        self._working = asyncio.ensure_future(self._answer(route, call))
        try:
            await self._working
        except asyncio.CancelledError:
            if self.refused is not None:
                self.send(error_reply(self.refused, self.dialect))
            elif not self.request.connection.stream.closed():  # type: ignore[union-attr]
                raise

    async def _answer(self, route: Route, call: Call) -> None:
        try:
            reply = await self.api.answer(route, call)
            if reply.stream is None:
                self.send(reply)
            else:
                await self._send_stream(reply, reply.stream)
        except (StreamClosedError, TimeoutError):
            log.debug("%s went away during a stream", self.request.remote_ip)
            self._break_off()
        except Exception:
            log.exception("%s %s failed", self.request.method, route.path)
            if self._headers_written:
                self._break_off()
            else:
                self.send(
                    error_reply(ServerError("the server failed to answer; its log says why"), self.dialect)
                )

    def send(self, reply: Reply) -> None:
        self._head(reply)
        self.finish(reply.body)

    async def _send_stream(self, reply: Reply, stream: Stream) -> None:
        self._head(reply)
        if stream.size is not None:
            self.set_header("Content-Length", str(stream.size))
        async with aclosing(stream.chunks) as chunks:
            async for chunk in chunks:
                self.write(chunk)
                async with asyncio.timeout(TAKES_SECONDS):
                    await self.flush()
        self.finish()

    def _break_off(self) -> None:
        """Close the connection: an incomplete answer must not look complete."""
        connection = self.request.connection
        if connection is not None and not connection.stream.closed():  # type: ignore[attr-defined]
            self.detach().close()

    def _head(self, reply: Reply) -> None:
        self.set_status(reply.status)
        self.set_header("Content-Type", reply.content_type)
        for name, value in reply.headers.items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado itself refuses (a malformed request line, a method we do not have)."""
        error = ServerError("the server failed to answer") if status_code >= 500 else UserError(self._reason)
        error.status = status_code
        self.send(error_reply(error, self.dialect))
