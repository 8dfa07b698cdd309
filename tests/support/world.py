"""A service with a scripted engine, and shorthand for what a client does: the world of the service's tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from tests.support.scripted_engine import OneModel, ScriptedEngines
from tuft_jupyter.core.journal import Journal, MemoryJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.quotas import Limits, Quotas
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.snapshots import SnapshotRule
from tuft_jupyter.core.types import AdamParams, Principal

ALICE, BOB = Principal("alice"), Principal("bob")
LORA = {"rank": 8, "seed": 1}


class World:
    """A service with one scripted engine, and shorthand for what a client does."""

    def __init__(
        self,
        home: Path,
        journal: Journal,
        engines: ScriptedEngines,
        rule: SnapshotRule,
        limits: Limits | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.engines = engines
        self.service = Service(
            Ledger(journal), OneModel(), engines, home, home / "checkpoints", limits, rule, quotas
        )
        self.seq = 0

    @property
    def trained(self) -> list[str]:
        (run,) = self.engines.trainer.runs.values()
        return run

    async def connect(self, who: Principal = ALICE, number: int = 0) -> str:
        session = await self.service.sessions.open(who, {"tags": []})
        made = await self.service.runs.create_model(who, session, number, "tiny", LORA, {}, b"create")
        await self.answer(made, who)
        return f"{session}:train:{number}"

    async def forward_backward(
        self, run: str, tokens: int = 8, who: Principal = ALICE, text: str = ""
    ) -> str:
        self.seq += 1
        body = (text or f"b{self.seq}:{tokens}").encode()
        runs = self.service.runs
        return await runs.forward_backward(who, run, self.seq, tokens, body, "x", backward=True)

    async def optim_step(self, run: str, who: Principal = ALICE) -> str:
        self.seq += 1
        return await self.service.runs.optim_step(who, run, self.seq, AdamParams(), f"o{self.seq}".encode())

    async def answer(self, request_id: str, who: Principal = ALICE) -> Answer:
        answer = await self.service.retrieve(who, request_id, 5.0)
        assert answer is not None, "no answer within five seconds"
        return answer

    async def train(self, run: str, steps: int) -> list[str]:
        """Pipeline passes and steps; returns the request ids of the passes."""
        passes, waits = [], []
        for _ in range(steps):
            passes.append(await self.forward_backward(run))
            waits += [passes[-1], await self.optim_step(run)]
        for request_id in waits:
            assert not (await self.answer(request_id)).category
        return passes


@contextlib.asynccontextmanager
async def world(
    home: Path,
    *,
    journal: Journal | None = None,
    engines: ScriptedEngines | None = None,
    rule: SnapshotRule | None = None,
    limits: Limits | None = None,
    quotas: Quotas | None = None,
) -> AsyncIterator[World]:
    made = World(
        home,
        journal or MemoryJournal(),
        engines or ScriptedEngines(),
        rule or SnapshotRule(3, 1e9),
        limits,
        quotas,
    )
    made.service.drain_seconds = 0.05  # tests leave engines that hang
    await made.service.start()
    try:
        yield made
    finally:
        await made.service.stop()


def scenario(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something that happens in it has happened."""
    while not condition():  # noqa: ASYNC110 - the condition is a plain dict, nothing could be awaited
        await asyncio.sleep(0)


def stepped(passes: list[str]) -> list[str]:
    return [name for each in passes for name in (each, "step")]
