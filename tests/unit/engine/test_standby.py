"""A spare worker: made a little later, taken once, and never one that is dead or of another Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.engine import standby
from tuft_jupyter.engine.actor import Actor
from tuft_jupyter.engine.ray_place import Place
from tuft_jupyter.engine.ray_runtime import Session
from tuft_jupyter.engine.standby import Standby

SESSION = Session(Place("local", "a test"), 0.0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "DELAY_SECONDS", 0.0)


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        yield psutil.Process(running.pid)
        running.kill()


class World:
    """Makes spares that are one and the same process."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.made: list[Actor] = []
        self.ended: list[Actor] = []
        self.broken = False
        self.ready = asyncio.Event()
        self.ready.set()
        self.standby = Standby(self.create, self.prepare, self.end)

    async def create(self, session: Session) -> Actor:
        self.made.append(Actor(None, session, asyncio.get_running_loop().create_future()))
        return self.made[-1]

    async def prepare(self, actor: Actor) -> None:
        if self.broken:
            raise EngineDied("it broke")
        actor.pid, actor.process = self.process.pid, self.process
        await self.ready.wait()

    async def end(self, actor: Actor) -> None:
        self.ended.append(actor)

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_a_spare_is_made_once_and_taken_once(process: psutil.Process) -> None:
    """F1: also while it still imports, because that is further than a new one would be."""

    async def body() -> None:
        world = World(process)
        world.ready.clear()
        for _ in range(3):
            world.standby.renew(SESSION)
        assert world.standby.take(SESSION) is None
        await world.settled()
        assert world.standby.pid is None, "not ready yet"
        assert world.standby.take(SESSION) is world.made[0]
        assert world.standby.take(SESSION) is None
        world.ready.set()
        await world.settled()
        world.standby.renew(SESSION)
        await world.settled()
        assert (len(world.made), world.standby.pid) == (2, process.pid)
        await world.standby.end()
        assert world.ended == world.made[1:], "the first one is somebody else's"

    asyncio.run(body())


def test_a_spare_that_died_is_not_taken_nor_one_of_a_ray_that_is_gone(process: psutil.Process) -> None:
    async def body() -> None:
        world = World(process)
        world.standby.renew(SESSION)
        await world.settled()
        assert world.standby.take(Session(Place("local", "another"), 0.0)) is None
        world.standby.renew(SESSION)
        await world.settled()
        process.kill()
        process.wait()
        assert (world.standby.pid, world.standby.take(SESSION)) == (None, None)

    asyncio.run(body())


def test_where_memory_is_short_or_it_breaks_there_is_none(
    process: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        world = World(process)
        monkeypatch.setattr(standby, "FREE_BYTES", 2**60)
        world.standby.renew(SESSION)
        await world.settled()
        assert world.made == []
        monkeypatch.setattr(standby, "FREE_BYTES", 0)
        world.broken = True
        world.standby.renew(SESSION)
        await world.settled()
        assert (world.ended, world.standby.take(SESSION)) == (world.made, None)
        assert len(world.made) == 1

    asyncio.run(body())
