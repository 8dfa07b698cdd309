"""Several sampling engines that are one: each has the whole model, and a request goes to the one with the fewest.

Knows neither Ray nor torch. Promises that a request's further calls reach the replica that has it, and that the death
of one leaves the others alone: the next start brings up only those that are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any, Protocol

from tuft_jupyter.core.engine import Outcome, Part, SamplingEngine, TextTask


class Replica(SamplingEngine, Protocol):
    """An engine whose process can also be ended, with the GPUs that it has."""

    @property
    def running(self) -> bool: ...

    async def give_up(self) -> None: ...

    def resources(self) -> dict[str, Any]: ...


class SamplingReplicas:
    """Implements ``core.engine.SamplingEngine`` over one engine per replica."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self.sent = [0] * len(replicas)
        """requests that each replica was given since the last start"""
        self._under_way: dict[str, int] = {}

    @property
    def on_progress(self) -> Callable[[str], None]:
        return self.replicas[0].on_progress

    @on_progress.setter
    def on_progress(self, listener: Callable[[str], None]) -> None:
        self.replicas[0].on_progress = listener

    async def start(self) -> None:
        """Bring up all that do not run; if one cannot be, none is left."""
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas:
                    if not replica.running:
                        group.create_task(replica.start())
        except BaseExceptionGroup as failures:
            await asyncio.gather(*(replica.give_up() for replica in self.replicas))
            raise failures.exceptions[0] from None
        self.sent = [0] * len(self.replicas)

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        with self._sent(request_id) as replica:
            return await replica.sample(request_id, adapter, body, tenant=tenant)

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        with self._sent(task.request_id) as replica:
            async with contextlib.aclosing(replica.complete(task)) as parts:
                async for part in parts:
                    yield part

    async def cancel(self, request_id: str) -> None:
        if request_id in self._under_way:
            await self.replicas[self._under_way[request_id]].cancel(request_id)

    async def waits_for(self, request_id: str) -> str:
        if request_id not in self._under_way:
            return ""
        return await self.replicas[self._under_way[request_id]].waits_for(request_id)

    async def stop(self) -> None:
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    def resources(self) -> dict[str, Any]:
        """The first replica's process as the lab shows it."""
        return self.replicas[0].resources()

    @contextlib.contextmanager
    def _sent(self, request_id: str) -> Iterator[Replica]:
        """The replica with the fewest requests under way; of those the one that was given the fewest so far."""
        busy = list(self._under_way.values())
        chosen = min(range(len(self.replicas)), key=lambda i: (busy.count(i), self.sent[i], i))
        self.sent[chosen] += 1
        self._under_way[request_id] = chosen
        try:
            yield self.replicas[chosen]
        finally:
            self._under_way.pop(request_id, None)
