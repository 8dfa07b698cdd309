"""What the JupyterLab panel reads: the state once, then live records over one websocket.

These routes are Jupyter's: its identity, XSRF check and authorizer apply (resource ``tuft``). They do not count as
activity, so a panel that is left open does not keep a culled server alive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado import web
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from tuft_jupyter import metrics
from tuft_jupyter.core.views import state_view
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.live import messages


class LabRead(APIHandler):
    """What the panel may read: behind Jupyter's authorizer, and no activity that keeps a server alive."""

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, host: Host) -> None:
        self.host = host


class LabState(LabRead):
    """GET: everything the panel shows, as of record ``state.n``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        state = state_view(self.host.ledger.state)
        body = {"state": state, "status": self.host.status(self.host.owner)}
        self.set_header("Content-Type", "application/json")
        self.finish(msgspec.json.encode(body))


class LabExport(LabRead):
    """GET: a run's metrics as a file (``?run=``, ``?format=csv``, ``jsonl`` or ``tensorboard``)."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        form, run = self.get_query_argument("format", "csv"), self.get_query_argument("run", "")
        columns = await self.columns(run)
        if columns is None:
            raise web.HTTPError(404, "run: there is none with this id")
        if form not in metrics.FORMATS:
            raise web.HTTPError(400, f"format: {form!r} is none of {', '.join(metrics.FORMATS)}")
        write = metrics.events_elsewhere if form == "tensorboard" else metrics.FORMATS[form][1]
        try:
            content = await asyncio.to_thread(write, run, columns)
        except metrics.CannotExport as problem:
            raise web.HTTPError(400, str(problem)) from None
        name = metrics.file_name(run, form)
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Content-Disposition", f'attachment; filename="{name}"')
        self.finish(content, set_content_type="application/octet-stream")

    async def columns(self, run: str) -> dict[str, list[float | None]] | None:
        """A run's curve by column; None if there is no such run."""
        found = self.host.ledger.state.runs.get(run)
        return None if found is None else {name: list(values) for name, values in found.curve.items()}


class LabFeed(WebSocketMixin, WebSocketHandler, JupyterHandler):
    """Websocket: the messages of :mod:`~tuft_jupyter_server.live`, each once the one before has left."""

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, host: Host) -> None:
        self.host = host
        self._telling: asyncio.Task[None] | None = None

    @ws_authenticated
    @authorized
    async def get(self, *args: Any, **kwargs: Any) -> None:
        await super().get(*args, **kwargs)

    def open(self, *args: str, **kwargs: str) -> None:
        super().open(*args, **kwargs)
        since = self.get_query_argument("since", "")
        self._telling = asyncio.get_running_loop().create_task(
            self._tell(int(since) if since.isdecimal() else None)
        )

    def on_message(self, message: str | bytes) -> None:
        """The panel has nothing to say."""

    def on_close(self) -> None:
        super().on_close()
        if self._telling is not None:
            self._telling.cancel()

    async def messages(self, since: int | None) -> AsyncGenerator[bytes, None]:
        """What the panel is told, as JSON: of everybody, since who may see the lab owns the server."""
        async with aclosing(messages(self.host, self.host.owner, None, since)) as told:
            async for message in told:
                yield msgspec.json.encode(message)

    async def _tell(self, since: int | None) -> None:
        try:
            with contextlib.suppress(WebSocketClosedError):
                async with aclosing(self.messages(since)) as told:
                    async for message in told:
                        await self.write_message(message.decode())
        finally:
            self.close()  # whoever told us is gone, or failed: the panel begins anew, and is not left with old news


def handlers(root: str, host: Host) -> list[tuple[str, type[web.RequestHandler], dict[str, Any]]]:
    return [
        (root + "/lab/state", LabState, {"host": host}),
        (root + "/lab/export", LabExport, {"host": host}),
        (root + "/lab/feed", LabFeed, {"host": host}),
    ]
