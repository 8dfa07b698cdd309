"""The route table for the panel: the same verbs under Jupyter's identity instead of a key.

What a key may do, the owner of the notebook server may do from the lab: delete a checkpoint, sample, export. Jupyter's
identity, XSRF check and authorizer apply (resource ``tuft``); routes about a key itself are left out. Like the rest of
the panel's traffic these calls do not count as activity. The paths are those of the table, below ``lab/api/v1``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web
from tornado.iostream import StreamClosedError

from tuft_jupyter.core.errors import TooLarge, UserError
from tuft_jupyter.core.types import JSON
from tuft_jupyter.wire.api import Call, Reply, error_reply
from tuft_jupyter.wire.routes import ROUTES, Access, Route
from tuft_jupyter.wire.verbs.base import ANYTHING
from tuft_jupyter_server.host import Host

PREFIX = "/lab/api/v1"
OF_A_KEY = {"auth_token", "key_info", "revoke_key"}


class LabCall(APIHandler):
    """One path of the table. ``routes`` maps its methods."""

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, host: Host, routes: Mapping[str, Route]) -> None:
        self.host = host
        self.routes = routes
        self._answering: asyncio.Task[Reply] | None = None

    @property
    def content_security_policy(self) -> str:
        return super().content_security_policy + "; sandbox"

    @web.authenticated
    @authorized
    async def get(self, **parts: str) -> None:
        await self._serve(parts)

    @web.authenticated
    @authorized
    async def post(self, **parts: str) -> None:
        await self._serve(parts)

    @web.authenticated
    @authorized
    async def put(self, **parts: str) -> None:
        await self._serve(parts)

    @web.authenticated
    @authorized
    async def delete(self, **parts: str) -> None:
        await self._serve(parts)

    def on_connection_close(self) -> None:
        if self._answering is not None:
            self._answering.cancel()

    async def _serve(self, parts: Mapping[str, str]) -> None:
        route = self.routes.get(self.request.method or "")
        if route is None:
            self._send(error_reply(UserError(f"this path answers {', '.join(self.routes)}")))
            return
        limit = min(route.max_body, self.host.settings.max_body_bytes)
        if len(self.request.body) > limit:
            size = len(self.request.body)
            self._send(
                error_reply(TooLarge(f"the body has {size} bytes, the limit of {route.path} is {limit}"))
            )
            return
        prefix = self.request.path.partition(PREFIX)[0]
        call = Call(
            self.host.owner,
            parts,
            {name: self.get_query_argument(name) for name in self.request.query_arguments},
            self.request.body,
            self.request.headers.get("Content-Type", JSON),
            self.request.headers.get("Accept", ANYTHING),
            f"{self.request.protocol}://{self.request.host}{prefix}/api/v1",
        )
        self._answering = asyncio.ensure_future(self.host.api.answer(route, call))
        try:
            answer = await self._answering
            if answer.stream is None:
                self._send(answer)
                return
            self._head(answer)
            async for chunk in answer.stream.chunks:
                self.write(chunk)
                await self.flush()
            self.finish(set_content_type=answer.content_type)
        except StreamClosedError:
            self.log.debug("the page went away during %s", route.path)
        except asyncio.CancelledError:
            if not self.request.connection.stream.closed():  # type: ignore[union-attr]
                raise

    def _send(self, answer: Reply) -> None:
        self._head(answer)
        self.finish(answer.body, set_content_type=answer.content_type)

    def _head(self, answer: Reply) -> None:
        self.set_status(answer.status)
        self.set_header("Content-Type", answer.content_type)
        for name, value in answer.headers.items():
            self.set_header(name, value)


def handlers(root: str, host: Host) -> list[tuple[str, type[LabCall], dict[str, Any]]]:
    """Tornado rules for what of the table the lab may call."""
    by_path: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        if route.access is Access.KEY and route.verb not in OF_A_KEY:
            by_path.setdefault(route.pattern, {})[route.method] = route
    return [
        (root + PREFIX + pattern, LabCall, {"host": host, "routes": routes})
        for pattern, routes in by_path.items()
    ]
