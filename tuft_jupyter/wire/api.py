"""The Tinker API: a request's bytes in, an answer's bytes out.

An endpoint reads its message, asks the :class:`~tuft_jupyter.core.service.Service`, and writes the answer the SDK
expects. Every failure is raised as a :class:`~tuft_jupyter.core.errors.TuftError` and leaves here in one JSON shape.
It knows nothing of Tornado, and never looks inside tensors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from tuft_jupyter.core.errors import Overloaded, TuftError
from tuft_jupyter.core.service import Service
from tuft_jupyter.wire.endpoints.account import AccountEndpoints
from tuft_jupyter.wire.endpoints.base import Call, Host, Reply, error_reply
from tuft_jupyter.wire.endpoints.keys import KeyEndpoints
from tuft_jupyter.wire.endpoints.openai import OpenAIEndpoints
from tuft_jupyter.wire.endpoints.rest import RestEndpoints
from tuft_jupyter.wire.endpoints.sampling import SamplingEndpoints
from tuft_jupyter.wire.endpoints.search import SearchEndpoints
from tuft_jupyter.wire.endpoints.sessions import SessionEndpoints
from tuft_jupyter.wire.endpoints.training import TrainingEndpoints
from tuft_jupyter.wire.endpoints.transfer import TransferEndpoints
from tuft_jupyter.wire.endpoints.upload import UploadEndpoints
from tuft_jupyter.wire.endpoints.watching import WatchingEndpoints
from tuft_jupyter.wire.routes import Route

HOLD_SECONDS = 20.0
"""How long a poll is held: the SDK gives up at 45 or 90 s and never sleeps between polls."""

WAITING = frozenset({"retrieve_future", "retrieve_futures", "outlook", "healthz", "readyz"})
"""Endpoints that wait for something to happen, or say how the server is: they are not counted as requests at work."""

Watch = Callable[[Route, str], AbstractContextManager[Callable[[int], None]]]
"""What is put around each request: told the route and the caller's ``traceparent``, and then the status."""


class Api(
    SessionEndpoints,
    TrainingEndpoints,
    SamplingEndpoints,
    RestEndpoints,
    TransferEndpoints,
    UploadEndpoints,
    AccountEndpoints,
    KeyEndpoints,
    SearchEndpoints,
    WatchingEndpoints,
    OpenAIEndpoints,
):
    def __init__(
        self,
        service: Service,
        host: Host,
        hold_seconds: float = HOLD_SECONDS,
        watch: Watch | None = None,
        max_ongoing: int = 0,
    ) -> None:
        self.service = service
        self.host = host
        self.hold_seconds = hold_seconds
        self._watch = watch
        self._max_ongoing = max_ongoing
        self._ongoing = 0

    async def answer(self, route: Route, call: Call) -> Reply:
        """Answer one request; a refusal comes back as a reply, never as an exception."""
        if self._watch is None:
            return await self._answer(route, call)
        with self._watch(route, call.trace) as answered:
            answer = await self._answer(route, call)
            answered(answer.status)
            return answer

    async def _answer(self, route: Route, call: Call) -> Reply:
        endpoint: Callable[[Call], Awaitable[Reply]] = getattr(self, route.endpoint)
        counted = route.endpoint not in WAITING
        try:
            if counted and 0 < self._max_ongoing <= self._ongoing:
                raise Overloaded(
                    f"{self._ongoing} requests are being answered, as many as this server takes at once "
                    "(max_ongoing_requests): send this one again",
                    1.0,
                )
            self._ongoing += counted
            try:
                answer = await endpoint(call)
            finally:
                self._ongoing -= counted
        except TuftError as error:
            answer = error_reply(error, route.dialect)
        self.service.counters.add("requests", route=route.endpoint, status=str(answer.status))
        return answer


__all__ = ["Api", "Call", "Host", "Reply", "error_reply"]
