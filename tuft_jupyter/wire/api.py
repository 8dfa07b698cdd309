"""The Tinker API: a request's bytes in, an answer's bytes out.

A verb reads its message, asks the :class:`~tuft_jupyter.core.service.Service`, and writes the answer the SDK expects.
Every failure is raised as a :class:`~tuft_jupyter.core.errors.TuftError` and leaves here in one JSON shape. It knows
nothing of Tornado, and never looks inside tensors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.service import Service
from tuft_jupyter.wire.routes import Route
from tuft_jupyter.wire.verbs.account import AccountVerbs
from tuft_jupyter.wire.verbs.base import Call, Host, Reply, error_reply
from tuft_jupyter.wire.verbs.keys import KeyVerbs
from tuft_jupyter.wire.verbs.openai import OpenAIVerbs
from tuft_jupyter.wire.verbs.rest import RestVerbs
from tuft_jupyter.wire.verbs.sampling import SamplingVerbs
from tuft_jupyter.wire.verbs.search import SearchVerbs
from tuft_jupyter.wire.verbs.sessions import SessionVerbs
from tuft_jupyter.wire.verbs.training import TrainingVerbs
from tuft_jupyter.wire.verbs.transfer import TransferVerbs
from tuft_jupyter.wire.verbs.upload import UploadVerbs
from tuft_jupyter.wire.verbs.watching import WatchingVerbs

HOLD_SECONDS = 20.0
"""How long a poll is held: the SDK gives up at 45 or 90 s and never sleeps between polls."""

Watch = Callable[[Route, str], AbstractContextManager[Callable[[int], None]]]
"""What is put around each request: told the route and the caller's ``traceparent``, and then the status."""


class Api(
    SessionVerbs,
    TrainingVerbs,
    SamplingVerbs,
    RestVerbs,
    TransferVerbs,
    UploadVerbs,
    AccountVerbs,
    KeyVerbs,
    SearchVerbs,
    WatchingVerbs,
    OpenAIVerbs,
):
    def __init__(
        self,
        service: Service,
        host: Host,
        hold_seconds: float = HOLD_SECONDS,
        watch: Watch | None = None,
    ) -> None:
        self.service = service
        self.host = host
        self.hold_seconds = hold_seconds
        self._watch = watch

    async def answer(self, route: Route, call: Call) -> Reply:
        """Answer one request; a refusal comes back as a reply, never as an exception."""
        if self._watch is None:
            return await self._answer(route, call)
        with self._watch(route, call.trace) as answered:
            answer = await self._answer(route, call)
            answered(answer.status)
            return answer

    async def _answer(self, route: Route, call: Call) -> Reply:
        verb: Callable[[Call], Awaitable[Reply]] = getattr(self, route.verb)
        try:
            answer = await verb(call)
        except TuftError as error:
            answer = error_reply(error, route.dialect)
        self.service.counters.add("requests", route=route.verb, status=str(answer.status))
        return answer


__all__ = ["Api", "Call", "Host", "Reply", "error_reply"]
