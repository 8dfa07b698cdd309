"""Request bodies too large for memory, kept in a file without a name that is gone when it is closed.

A body over the limit is no longer written, only counted, so that the refusal can name its size. Both the API's handler
and the panel's own (:class:`LabUpload`) keep bodies so; what becomes of them is up to the endpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import ensure_async
from tornado import web

from tuft_jupyter.core.errors import ServerError, TooLarge, TuftError
from tuft_jupyter.wire.api import Call, error_reply
from tuft_jupyter.wire.routes import Route
from tuft_jupyter_server.base_handler import BaseHandler
from tuft_jupyter_server.host import Host


class Spool:
    """``file`` holds what has come so far, at most ``limit`` bytes; it lies in ``directory``."""

    def __init__(self, directory: Path, limit: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = cast("BinaryIO", tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - closed by close()
        self.limit = limit
        self.size = 0
        self._failed: OSError | None = None
        self._whole = False

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size <= self.limit and self._failed is None:
            try:
                self.file.write(chunk)
            except OSError as error:  # answered once the body has been read: no client reads before
                self._failed = error

    def check(self, path: str) -> None:
        """When all has come: TooLarge if it is more than ``path`` takes, ServerError if the disk did not take it."""
        self._whole = True
        if self.size > self.limit:
            raise TooLarge(
                f"the body has {self.size} bytes or more, the limit of {path} is {self.limit}: "
                "send a smaller adapter, or ask the operator to raise max_upload_bytes"
            )
        if self._failed is not None:
            raise ServerError(
                f"the upload could not be kept ({self._failed.strerror}): "
                "free space in checkpoint_dir, then send it again"
            )

    def break_off(self) -> None:
        """Nothing more comes; a part is of no use to anybody."""
        if not self._whole:
            self.close()

    def close(self) -> None:
        self.file.close()


@web.stream_request_body
class LabUpload(BaseHandler, APIHandler):
    """The one method of an upload's path, for the panel: Jupyter's identity, XSRF check and authorizer apply."""

    auth_resource = "tuft"

    def initialize(self, host: Host, route: Route) -> None:
        self.host = host
        self.api = host.api
        self.route = route
        self._spool: Spool | None = None

    async def prepare(self, **options: Any) -> None:  # type: ignore[override]
        await super().prepare(**options)
        if self._finished:
            return
        who = self.current_user
        allowed = who and await ensure_async(
            self.authorizer.is_authorized(self, who, "write", self.auth_resource)
        )
        if not allowed:  # before a byte of the body is read
            raise web.HTTPError(403)
        limit = self.host.settings.max_upload_bytes
        self._spool = Spool(self.host.settings.checkpoint_dir, limit)
        self.request.connection.set_max_body_size(limit + 1)  # type: ignore[union-attr]

    def data_received(self, chunk: bytes) -> None:
        if self._spool is not None:
            self._spool.write(chunk)

    @web.authenticated
    @authorized
    async def post(self) -> None:
        assert self._spool is not None
        try:
            await self.recovered()
            self._spool.check(self.route.path)
        except TuftError as error:
            self.send(error_reply(error))
            return
        await self.keep(self._spool)

    async def keep(self, spool: Spool) -> None:
        """Have the body taken over, and answer."""
        query = {name: self.get_query_argument(name) for name in self.request.query_arguments}
        await self.answer(self.route, Call(self.host.owner, query=query, upload=spool.file))

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self._spool is not None:
            self._spool.break_off()

    def on_finish(self) -> None:
        super().on_finish()
        if self._spool is not None:
            self._spool.close()
