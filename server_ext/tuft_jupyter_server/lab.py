"""What the JupyterLab panel reads: the state once, then live records over one websocket.

These routes are Jupyter's: its identity, XSRF check and authorizer apply (resource ``tuft``). They do not count as
activity, so a panel that is left open does not keep a culled server alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from tornado import web
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from tuft_jupyter import metrics
from tuft_jupyter.core.engine import RunMemory
from tuft_jupyter.core.feed import Subscription
from tuft_jupyter.core.outlook import waiting
from tuft_jupyter.core.views import record_view, state_view
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.logtail import TAIL

COALESCE = 0.1
"""Seconds between two messages with records: the first of a burst leaves at once, the others are gathered."""
GAUGE_SECONDS = 1.0


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
        form = self.get_query_argument("format", "csv")
        run = self.host.ledger.state.runs.get(self.get_query_argument("run", ""))
        if run is None:
            raise web.HTTPError(404, "run: there is none with this id")
        if form not in metrics.FORMATS:
            raise web.HTTPError(400, f"format: {form!r} is none of {', '.join(metrics.FORMATS)}")
        write = metrics.events_elsewhere if form == "tensorboard" else metrics.FORMATS[form][1]
        columns = {name: list(values) for name, values in run.curve.items()}
        try:
            content = await asyncio.to_thread(write, run.id, columns)
        except metrics.CannotExport as problem:
            raise web.HTTPError(400, str(problem)) from None
        name = metrics.file_name(run.id, form)
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Content-Disposition", f'attachment; filename="{name}"')
        self.finish(content, set_content_type="application/octet-stream")


class LabFeed(WebSocketMixin, WebSocketHandler, JupyterHandler):
    """Websocket: ``records`` as they happen; ``status``, ``queue``, ``log`` as they change; ``gauges`` each second.

    With the gauges come ``runs``, what each takes in memory, as they change.
    """

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, host: Host) -> None:
        self.host = host
        self._tasks: list[asyncio.Task[None]] = []
        self._subscription: Subscription | None = None

    @ws_authenticated
    @authorized
    async def get(self, *args: Any, **kwargs: Any) -> None:
        await super().get(*args, **kwargs)

    def open(self, *args: str, **kwargs: str) -> None:
        super().open(*args, **kwargs)
        self._subscription = self.host.ledger.feed.subscribe(None)
        since = self.get_query_argument("since", "")
        if since.isdecimal() and int(since) != self.host.ledger.state.n:
            self._post({"type": "resync"})
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._send_records(self._subscription)),
            loop.create_task(self._send_gauges()),
        ]

    def on_message(self, message: str | bytes) -> None:
        """The panel has nothing to say."""

    def on_close(self) -> None:
        super().on_close()
        for task in self._tasks:
            task.cancel()
        if self._subscription is not None:
            self.host.ledger.feed.unsubscribe(self._subscription)

    async def _send_records(self, subscription: Subscription) -> None:
        loop = asyncio.get_running_loop()
        sent = -COALESCE
        while True:
            records = await subscription.take()
            await asyncio.sleep(max(0.0, sent + COALESCE - loop.time()))
            records += subscription.drain()
            sent = loop.time()
            if subscription.overflowed:
                subscription.overflowed = False
                self._post({"type": "resync"})
            else:
                shown = [record_view(record) for record in records]
                await self._write({"type": "records", "records": shown})

    async def _send_gauges(self) -> None:
        status: dict[str, Any] = {}
        queue: list[dict[str, Any]] = []
        runs: Mapping[str, RunMemory] = {}
        seen = 0
        with self.host.gauges.watched():
            while True:
                now = self.host.status(self.host.owner)
                if now != status:
                    status = now
                    await self._write({"type": "status", "status": status})
                if self.host.gauges.latest:
                    changed = {} if self.host.gauges.runs == runs else {"runs": self.host.gauges.runs}
                    runs = self.host.gauges.runs
                    await self._write({"type": "gauges", **self.host.gauges.latest, **changed})
                waits = waiting(self.host.service)
                if waits != queue:
                    queue = waits
                    await self._write({"type": "queue", "queue": queue})
                lines = TAIL.since(seen)
                if lines:
                    seen = lines[-1]["n"]
                    await self._write({"type": "log", "lines": lines})
                await asyncio.sleep(GAUGE_SECONDS)

    async def _write(self, message: dict[str, Any]) -> None:
        """Send and wait until it left: a reader that is slow slows only its own queue."""
        try:
            await self.write_message(msgspec.json.encode(message).decode())
        except WebSocketClosedError:
            for task in self._tasks:
                task.cancel()

    def _post(self, message: dict[str, Any]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(self._write(message)))


def handlers(root: str, host: Host) -> list[tuple[str, type[web.RequestHandler], dict[str, Any]]]:
    return [
        (root + "/lab/state", LabState, {"host": host}),
        (root + "/lab/export", LabExport, {"host": host}),
        (root + "/lab/feed", LabFeed, {"host": host}),
    ]
