"""Sampling on the training server elsewhere, which has the weights already: requests are handed on as they came.

Knows the Tinker protocol's two calls for it, and the OpenAI-compatible one of a server such as ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec

from tuft_jupyter.core.engine import EngineDied, Outcome, Part, TextTask
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.remote import kept_there
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.tinker_client import TinkerClient
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.openai import decode_request

PINNED = 256
"""Weights that are remembered as pinned there."""


class TinkerSampling:
    """Implements ``core.engine.SamplingEngine``."""

    def __init__(self, card: ModelCard, server: Server) -> None:
        self.card = card
        self.on_progress: Callable[[str], None] = lambda _: None
        self._server = server
        self._client: TinkerClient | None = None
        self._pinned: OrderedDict[str, asyncio.Task[str]] = OrderedDict()
        self._asked: dict[str, str] = {}

    async def start(self) -> None:
        """Open a session there; UserError says why that cannot be."""
        self.on_progress(f"asking the training server at {self._server.url}")
        await self.stop()
        client = TinkerClient(self._server)
        await client.open(self.card.name, known=False)
        self._pinned.clear()
        self._client = client

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        """Sample from the base model or from the adapter in a directory. EngineDied if the server went away."""
        client = self._connected()
        began = time.perf_counter()
        try:
            sampler = await self._sampler(client, adapter)
            names = {"sampling_session_id": sampler, "seq_id": client.number(sampler)}
            renamed = await self._server.work(_renamed, body, names)
            promise = await client.call("POST", "/asample", renamed)
            self._asked[request_id] = promise["request_id"]
            reply = await client.answer(promise)
            facts = await self._server.work(_facts, reply.body)
        except TuftError as error:
            return Outcome(request_id, category=error.category, error=error.message)
        finally:
            self._asked.pop(request_id, None)
        facts["engine_ms"] = round((time.perf_counter() - began) * 1e3, 3)
        return Outcome(request_id, result=reply.body, content_type=reply.content_type, facts=facts)

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """The whole answer as one part. A stream is refused: the protocol has none."""
        client = self._connected()
        try:
            asked = await self._server.work(lambda: decode_request(task.body, chat=task.chat))
            if asked.stream or task.input_tokens:
                raise UserError(
                    "stream: requests in OpenAI's form that are streamed, or limited in length, are not handed on to a "
                    "training server; leave out stream, or set backends.sampling"
                )
            model = self.card.name if task.adapter is None else kept_there.read(Path(task.adapter)).path
            sent = msgspec.json.decode(task.body, type=dict[str, msgspec.Raw]) | {"model": model}
            path = "/oai/api/v1/chat/completions" if task.chat else "/oai/api/v1/completions"
            reply = await client.send("POST", path, sent, root="")
            told = msgspec.json.decode(reply.body, type=dict[str, msgspec.Raw])
            usage = msgspec.json.decode(told.get("usage", msgspec.Raw(b"{}")))
            facts = {
                "prompt_tokens": usage.get("prompt_tokens", 0),
                "tokens": usage.get("completion_tokens", 0),
            }
            yield Part([msgspec.json.encode(told | {"model": asked.model})], ended=True, facts=facts)
        except TuftError as error:
            yield Part(ended=True, category=error.category, error=error.message)

    async def cancel(self, request_id: str) -> None:
        """Stop the drawing there; unknown ids are ignored."""
        asked = self._asked.get(request_id)
        if asked is not None and self._client is not None:
            with contextlib.suppress(TuftError):
                await self._client.send("POST", "/cancel_future", {"request_id": asked})

    async def waits_for(self, request_id: str) -> str:
        return ""

    def _connected(self) -> TinkerClient:
        if self._client is None:
            raise EngineDied(f"no session is open on the training server at {self._server.url}")
        return self._client

    async def _sampler(self, client: TinkerClient, adapter: str | None) -> str:
        """The name that weights are pinned under there; asked for once, however many ask at the same time."""
        key = adapter or ""
        pinning = self._pinned.get(key)
        if pinning is None or (pinning.done() and (pinning.cancelled() or pinning.exception())):
            pinning = self._pinned[key] = asyncio.ensure_future(self._pin(client, adapter))
            while len(self._pinned) > PINNED:
                self._pinned.popitem(last=False)
        self._pinned.move_to_end(key)
        return await asyncio.shield(pinning)

    async def _pin(self, client: TinkerClient, adapter: str | None) -> str:
        weights: dict[str, Any] = {"base_model": self.card.name}
        if adapter is not None:
            weights = {"model_path": (await self._server.work(kept_there.read, Path(adapter))).path}
        number = client.number("sampler")
        asked = {"session_id": client.session, "sampling_session_seq_id": number, **weights}
        return str((await client.call("POST", "/create_sampling_session", asked))["sampling_session_id"])


def _renamed(body: bytes, names: dict[str, Any]) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(body, type=dict[str, msgspec.Raw]) | names)


def _facts(body: bytes) -> dict[str, Any]:
    answer = pb.SampleResponse.FromString(body)
    return {"tokens": sum(len(sequence.tokens) // 4 for sequence in answer.sequences)}
