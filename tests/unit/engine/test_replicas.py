"""Several sampling engines behind one interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from tuft_jupyter.core.engine import EngineDied, Outcome, Part, TextTask
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine.replicas import SamplingReplicas


class Sampler:
    """Answers when it is let; ``broken`` cannot start."""

    def __init__(self, *, broken: bool = False) -> None:
        self.on_progress: Callable[[str], None] = lambda _: None
        self.running = False
        self.starts = 0
        self.drawing: dict[str, asyncio.Future[Outcome]] = {}
        self.cancelled: list[str] = []
        self._broken = broken

    async def start(self) -> None:
        if self._broken:
            raise ServerError("no room")
        self.starts += 1
        self.running = True

    async def give_up(self) -> None:
        self.running = False

    async def stop(self) -> None:
        await self.give_up()

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        self.drawing[request_id] = asyncio.get_running_loop().create_future()
        return await self.drawing[request_id]

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        self.drawing[task.request_id] = asyncio.get_running_loop().create_future()
        await self.drawing[task.request_id]
        yield Part(ended=True)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def waits_for(self, request_id: str) -> str:
        return f"room for {request_id}"

    def resources(self) -> dict[str, Any]:
        return {"pid": 1}


async def begun(group: SamplingReplicas, *names: str) -> list[asyncio.Task[Outcome]]:
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(group.sample(name, None, b"")))
        await asyncio.sleep(0)
    return tasks


def test_a_request_goes_to_the_replica_with_the_fewest_under_way() -> None:
    """S2-10."""

    async def scenario() -> None:
        first, second = Sampler(), Sampler()
        group = SamplingReplicas([first, second])
        await group.start()
        tasks = await begun(group, "a", "b", "c", "d")
        assert [list(first.drawing), list(second.drawing)] == [["a", "c"], ["b", "d"]]
        second.drawing["b"].set_result(Outcome("x"))
        await tasks[1]
        await begun(group, "e")
        assert "e" in second.drawing
        await group.cancel("c")
        await group.cancel("b")  # it is over
        assert (first.cancelled, second.cancelled) == (["c"], [])
        assert await group.waits_for("d") == "room for d"
        assert await group.waits_for("b") == ""

    asyncio.run(scenario())


def test_an_answer_in_parts_counts_until_its_end() -> None:
    async def scenario() -> None:
        first, second = Sampler(), Sampler()
        group = SamplingReplicas([first, second])
        await group.start()
        parts = group.complete(TextTask("t", None, b"", chat=True))
        task = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0)
        await begun(group, "a")
        assert "a" in second.drawing
        first.drawing["t"].set_result(Outcome("x"))
        assert (await task).ended
        await parts.aclose()
        await begun(group, "b")
        assert "b" in first.drawing

    asyncio.run(scenario())


def test_only_the_replica_that_died_is_started_again() -> None:
    """F1."""

    async def scenario() -> None:
        first, second = Sampler(), Sampler()
        group = SamplingReplicas([first, second])
        await group.start()
        (task,) = await begun(group, "a")
        first.running = False
        first.drawing["a"].set_exception(EngineDied("gone"))
        with pytest.raises(EngineDied):
            await task
        await group.start()
        assert (first.starts, second.starts) == (2, 1)

    asyncio.run(scenario())


def test_where_one_cannot_start_none_is_left() -> None:
    async def scenario() -> None:
        first, second = Sampler(), Sampler(broken=True)
        with pytest.raises(ServerError, match="no room"):
            await SamplingReplicas([first, second]).start()
        assert not first.running

    asyncio.run(scenario())
