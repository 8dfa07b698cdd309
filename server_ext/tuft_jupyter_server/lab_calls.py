"""The route table for the panel: the same endpoints under Jupyter's identity instead of a key.

What a key may do, the owner of the notebook server may do from the lab: delete a checkpoint, sample, export. Jupyter's
identity, XSRF check and authorizer apply (resource ``tuft``); routes about a key itself are left out. Like the rest of
the panel's traffic these calls do not count as activity. Paths are those of the table, below ``lab/api/v1``; those of
OpenAI-compatible inference are below ``lab/oai``. A signed address leads to its file from here too: it may be signed by
a Hub's service, which a browser need not reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from tuft_jupyter.core.errors import TooLarge, TuftError, UserError
from tuft_jupyter.core.types import JSON
from tuft_jupyter.wire.api import Call, Reply, error_reply
from tuft_jupyter.wire.endpoints.base import ANYTHING
from tuft_jupyter.wire.routes import OPENAI_ROUTES, ROUTES, Access, Route
from tuft_jupyter_server.base_handler import BaseHandler
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.uploads import LabUpload

TINKER, OPENAI = "/lab/api/v1", "/lab/oai"
OF_A_KEY = {"auth_token", "key_info", "revoke_key"}


class LabCall(BaseHandler, APIHandler):
    """One path of the table. ``routes`` maps its methods."""

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, host: Host, routes: Mapping[str, Route]) -> None:
        self.host = host
        self.api = host.api
        self.routes = routes
        self.dialect = next(iter(routes.values())).dialect

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

    async def _serve(self, parts: Mapping[str, str]) -> None:
        request = self.request
        route = self.routes.get(request.method or "")
        if route is None:
            refusal = UserError(
                f"{request.method} {request.path}: this path answers {', '.join(self.routes)}"
            )
            self.send(error_reply(refusal, self.dialect))
            return
        size, limit = len(request.body), min(route.max_body, self.host.settings.max_body_bytes)
        if size > limit:
            refusal = TooLarge(
                f"the body has {size} bytes, the limit of {route.path} is {limit}: send less at once"
            )
            self.send(error_reply(refusal, self.dialect))
            return
        try:
            await self.recovered()
        except TuftError as error:
            self.send(error_reply(error, self.dialect))
            return
        prefix = request.path.partition(TINKER)[0]
        call = Call(
            self.host.owner,
            parts,
            {name: self.get_query_argument(name) for name in request.query_arguments},
            request.body,
            request.headers.get("Content-Type", JSON),
            request.headers.get("Accept", ANYTHING),
            f"{request.protocol}://{request.host}{prefix}/api/v1",
        )
        await self.answer(route, call)

    def send(self, reply: Reply) -> None:
        """Jupyter would call every answer JSON, whatever its header says."""
        self._head(reply)
        self.finish(reply.body, set_content_type=reply.content_type)


Rule = tuple[str, type[APIHandler], dict[str, Any]]


def handlers(root: str, host: Host) -> list[Rule]:
    return rules(root, LabCall, LabUpload, {"host": host})


def rules(
    root: str, call: type[APIHandler], upload: type[APIHandler], shared: Mapping[str, Any]
) -> list[Rule]:
    """Tornado rules for what the lab may call. Beside ``shared``, a handler is given its ``routes`` by method, that of
    an upload its ``route``."""
    found: list[Rule] = []
    by_path: dict[str, dict[str, Route]] = {}
    for prefix, routes in ((TINKER, ROUTES), (OPENAI, OPENAI_ROUTES)):
        for route in routes:
            if route.upload:
                found.append((root + prefix + route.pattern, upload, {**shared, "route": route}))
            elif route.access is not Access.OPEN and route.endpoint not in OF_A_KEY:
                by_path.setdefault(prefix + route.pattern, {})[route.method] = route
    return found + [(root + path, call, {**shared, "routes": routes}) for path, routes in by_path.items()]
