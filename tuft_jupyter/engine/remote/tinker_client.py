"""A session on a server elsewhere that speaks the Tinker protocol: requests that arrive once, and their answers.

A request that was sent and not answered is sent again, the same bytes under the same number: the server takes the pair
of model and number for one request, so nothing is applied twice, also if the server itself was restarted meanwhile. How
long that goes on is bounded by :data:`PATIENCE`; after that, and when the server does not know our objects any more,
the engine counts as dead and is rebuilt by whoever drives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from tuft_jupyter._version import __version__
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import ServerError, TuftError, UserError, failure
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.engine.remote.http import Kind, Reply, Server, Unreachable

log = logging.getLogger(__name__)

KIND = Kind(
    "training server",
    ("/api/v1/healthz",),
    "If not, start it; it must speak the Tinker protocol, as another tuft-jupyter does: tuft launch --port 5000 . If "
    "it runs elsewhere, set MEGATRON_SERVER_URL",
)
API = "/api/v1"
PATIENCE = 45.0
"""Seconds for which a request that breaks is tried again."""
PAUSES = (0.1, 0.25, 0.5, 1.0, 2.0)
HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 120.0
"""Of one poll; the protocol answers after twenty."""
POLL_PAUSE = 0.1
"""Between two polls, as not every server holds them: one that says "not yet" at once would be asked without end."""


class TinkerClient:
    """One session on ``server``, which is there as soon as :meth:`open` returned."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session = ""
        self._numbers: dict[str, int] = {}
        self._beating: asyncio.Task[None] | None = None

    async def open(self, base_model: str, *, known: bool) -> None:
        """Connect and open a session. UserError says why that cannot be; of a server that was ``known`` to be there,
        a ServerError that it is not: it may come back."""
        if not await self.server.found():
            raise ServerError(self.server.detail) if known else UserError(self.server.detail)
        offered = await self.call("GET", "/get_server_capabilities")
        names = [each.get("model_name") for each in offered.get("supported_models", [])]
        if base_model not in names:
            raise UserError(
                f"the training server at {self.server.url} offers {', '.join(map(str, names)) or 'no models'}, not "
                f"{base_model}: start it with that model, under that name"
            )
        opened = {"tags": ["tuft-jupyter"], "user_metadata": {}, "sdk_version": f"tuft-jupyter/{__version__}"}
        self.session = (await self.call("POST", "/create_session", opened))["session_id"]
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    async def close(self) -> None:
        """End the session; what it had in training leaves the server."""
        if self._beating is not None:
            self._beating.cancel()
            ended = {"reason": {"type": "success"}, "detail": None}
            with contextlib.suppress(Unreachable):
                await self.server.ask("POST", f"{API}/sessions/{self.session}/finish", ended, seconds=5.0)

    def number(self, of: str) -> int:
        """The next number of a kind of thing, from 0."""
        self._numbers[of] = self._numbers.get(of, -1) + 1
        return self._numbers[of]

    async def call(
        self, method: str, path: str, body: Any = None, content_type: str = JSON
    ) -> dict[str, Any]:
        """The value of an answer that comes at once. See :meth:`send` for what it raises."""
        value = (await self.send(method, path, body, content_type)).json()
        if not isinstance(value, dict):
            raise ServerError(self._unknown(path))
        return value

    async def answer(self, promise: dict[str, Any]) -> Reply:
        """What a promise was kept with. TuftError if it says that the request failed."""
        asked = {"request_id": promise["request_id"], "allow_metadata_only": False}
        while True:
            reply = await self.send("POST", "/retrieve_future", asked)
            if reply.content_type.startswith(PROTOBUF):
                return reply
            value = reply.json()
            if not isinstance(value, dict):  # the page of a proxy, say: what was done there, nobody knows
                raise EngineDied(self._unknown("/retrieve_future"))
            if "error" in value:
                raise failure(str(value.get("category")), f"{value['error']}")
            if value.get("type") != "try_again":
                return reply
            await asyncio.sleep(POLL_PAUSE)

    async def settled(self, path: str, body: Any) -> dict[str, Any]:
        """Ask for a promise, and wait for the value that it is kept with."""
        value = (await self.answer(await self.call("POST", path, body))).json()
        return value if isinstance(value, dict) else {}

    async def send(
        self, method: str, path: str, body: Any = None, content_type: str = JSON, *, root: str = API
    ) -> Reply:
        """One request, sent again while it breaks. UserError if it is refused, ServerError if it is still too
        much for a limit there, EngineDied if the server or what we had there is gone."""
        deadline, tries, busy = 0.0, 0, False
        clock = asyncio.get_running_loop().time
        while True:
            try:
                reply = await self.server.ask(
                    method, root + path, body, seconds=POLL_SECONDS, Content_Type=content_type
                )
                if reply.ok:
                    return reply
                problem, busy = self._judged(reply, path), reply.status == 429
            except Unreachable as error:
                problem, busy = str(error), False
            if problem:
                deadline = deadline or clock() + PATIENCE
                if clock() > deadline:
                    raise ServerError(problem) if busy else EngineDied(problem)
                log.warning("trying again: %s", problem)
                await asyncio.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
                tries += 1
            else:
                deadline, tries = 0.0, 0  # it is there, and asks for time
                await asyncio.sleep(POLL_PAUSE)

    def _judged(self, reply: Reply, path: str) -> str:
        """Why to try again, "" if only time is needed; raises if trying again cannot help."""
        where, text = f"the training server at {self.server.url}", reply.error()
        if reply.status == 408:
            return ""
        if reply.status == 429 or reply.status >= 500:
            return f"{where} answers {path} with {reply.status}: {text}"
        if reply.status in (401, 403):
            raise UserError(f"{where} refuses our key ({text}): set MEGATRON_SERVER_KEY to one of its keys")
        if reply.status in (404, 410):
            raise EngineDied(f"{where} does not know what we ask for ({path}: {text})")
        raise UserError(f"{where} refuses the request: {text}")

    def _unknown(self, path: str) -> str:
        return f"the training server at {self.server.url} answers {path} in a form that is not known"

    async def download(self, url: str, target: Path) -> int:
        """Write what a signed address holds to a file; its size in bytes. The key is not sent there."""
        try:
            return await self.server.download(url, target)
        except Unreachable as error:
            raise ServerError(f"the weights could not be fetched from the training server: {error}") from None

    async def forget(self, path: str) -> None:
        """Delete a checkpoint there, if that can be; nobody waits for it."""
        run, kind, name = path.removeprefix("tinker://").rsplit("/", 2)
        with contextlib.suppress(TuftError, Unreachable, EngineDied):
            await self.server.ask(
                "DELETE", f"{API}/training_runs/{run}/checkpoints/{kind}/{name}", seconds=10.0
            )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            with contextlib.suppress(Unreachable):
                await self.server.ask(
                    "POST",
                    f"{API}/session_heartbeat",
                    {"session_id": self.session},
                    seconds=HEARTBEAT_SECONDS,
                )
