"""OpenAI-compatible inference: models, completions, chat completions, the latter two also as event streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.quotas import Work
from tuft_jupyter.core.text import Offered
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, error_reply, event, event_stream, reply
from tuft_jupyter.wire.openai import decode_head
from tuft_jupyter.wire.routes import Dialect

BYTES_PER_TOKEN = 4
"""A guess: nothing is tokenized in the notebook's process, and a rate needs no more."""

DONE = b"data: [DONE]\n\n"


class OpenAIEndpoints(Endpoints):
    async def oai_models(self, call: Call) -> Reply:
        return reply(
            {"object": "list", "data": [_model(m) for m in self.service.text.models(call.principal)]}
        )

    async def oai_model(self, call: Call) -> Reply:
        name = call.path["model"]
        card, _ = self.service.text.find(call.principal, name)
        owner = "tuft" if name == card.name else call.principal.tenant
        return reply(_model(Offered(name, owner)))

    async def oai_completions(self, call: Call) -> Reply:
        return await self._complete(call, chat=False)

    async def oai_chat(self, call: Call) -> Reply:
        return await self._complete(call, chat=True)

    async def _complete(self, call: Call, *, chat: bool) -> Reply:
        """The first piece is waited for, so that a refusal is one, with its status, and not an event."""
        head, quotas, tenant = decode_head(call.body), self.service.quotas, call.principal.tenant
        card, _ = self.service.text.find(call.principal, head.model)
        engine = (Work.SAMPLING, card.name)
        await quotas.pace(tenant, 1, len(call.body) // BYTES_PER_TOKEN, engine)
        allowed = quotas.input_tokens(tenant, engine)
        chunks = self.service.text.complete(
            call.principal, head.model, call.body, chat=chat, input_tokens=allowed
        )
        try:
            first = await anext(chunks)
        except BaseException:
            await chunks.aclose()
            raise
        if head.stream:
            return event_stream(_events(first, chunks))
        await chunks.aclose()
        return Reply(first)


async def _events(first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        yield event(first)
        try:
            async for chunk in chunks:
                yield event(chunk)
        except TuftError as error:
            yield event(error_reply(error, Dialect.OPENAI).body)
        yield DONE


def _model(offered: Offered) -> dict[str, Any]:
    return {
        "id": offered.name,
        "object": "model",
        "created": int(offered.created),
        "owned_by": offered.owner,
    }
