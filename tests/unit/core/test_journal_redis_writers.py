"""One writer at a time for a journal in Redis: who waits, who takes over, and that nobody else can write."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.support.redis_journals import journal, line, numbers
from tests.support.redis_server import RedisServer
from tests.support.sleeper import write
from tests.support.world import stepped, world
from tuft_jupyter.core import lease
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.journal import Unavailable
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.types import Record

pytestmark = pytest.mark.usefixtures("short_lease")


def test_a_second_server_is_refused_at_once_and_takes_over_after_the_holders_death(
    redis: RedisServer, tmp_path: Path
) -> None:
    """F8, S1-52: on one namespace."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        first, second = journal(redis, tmp_path), journal(redis, tmp_path)
        await first.open(lambda record: None)
        await first.append(line(1))
        began = loop.time()
        with pytest.raises(Unavailable, match=f"process {os.getpid()} on "):
            await second.open(lambda record: None)
        assert loop.time() - began < 2
        for task in first._tasks:  # it dies: nothing renews its lease
            task.cancel()
        while True:
            try:
                assert await numbers(second) == [1]
                break
            except Unavailable:
                await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_who_writes_says_where_it_answers_and_who_was_outlived_learns_it(
    redis: RedisServer, tmp_path: Path
) -> None:
    """S1-52: each sends its clients to the one that writes; nobody does once it is the writer itself."""

    async def scenario() -> None:
        first, second = journal(redis, tmp_path), journal(redis, tmp_path)
        first.address, second.address = "http://127.0.0.1:1/a/tuft", "http://127.0.0.1:2/b/tuft"
        await first.open(lambda record: None)
        with pytest.raises(Unavailable):
            await second.open(lambda record: None)
        assert (first.elsewhere, second.elsewhere) == ("", first.address)
        first._tasks.pop().cancel()  # it renews its lease no more
        while True:
            try:
                await second.open(lambda record: None)
                break
            except Unavailable:
                await asyncio.sleep(0.05)
        assert second.elsewhere == ""
        with pytest.raises(Overloaded, match="took over"):
            await first.append(line(1))
        assert first.elsewhere == second.address
        await first.close()
        await second.close()

    asyncio.run(scenario())


def test_a_server_that_was_killed_and_started_again_sends_nobody_to_itself(
    redis: RedisServer, tmp_path: Path
) -> None:
    """F2, S1-52: its own old lease stands for a moment; clients are told to come back later."""

    async def scenario() -> None:
        killed, again = journal(redis, tmp_path), journal(redis, tmp_path)
        killed.address = again.address = "http://127.0.0.1:8888/tuft"
        await killed.open(lambda record: None)
        killed._tasks.pop().cancel()
        with pytest.raises(Unavailable):
            await again.open(lambda record: None)
        assert again.elsewhere == ""
        await killed.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("address", "followed"),
    [
        ("http://10.1.2.3:10610", True),
        ("http://127.0.0.1:8888/tuft", False),
        ("http://localhost:8888/tuft", False),
        ("http://[::1]:8888/tuft", False),
        ("", True),
    ],
)
def test_the_loopback_address_of_another_machine_or_container_leads_nowhere(
    address: str, followed: bool
) -> None:
    """S1-52: a key is never sent to whatever listens there on this machine."""
    networks = (lease.network(), "f00-1")
    here, there = (f"process 7 on vm #0a {network} {address}".encode() for network in networks)
    assert lease.address_of(there) == (address if followed else "")
    assert lease.address_of(here) == address
    assert lease.address_of(b"process 7 on vm #0a") == ""


def rest(heard: Connection) -> str:
    """What a process says until it ends."""
    said = ""
    with contextlib.suppress(EOFError):
        while True:
            said += heard.recv() + "\n"
    return said


@pytest.mark.slow
def test_a_holder_that_was_asleep_cannot_write_any_more(redis: RedisServer, tmp_path: Path) -> None:
    """F8: 20 of 20 holders that are stopped in the middle of writing, outlived and woken are refused by their epoch."""
    spare = get_context("forkserver")  # imports once, not twenty times
    spare.set_forkserver_preload(["tests.support.sleeper"])

    async def outlived(namespace: str) -> list[Record]:
        """All that is on record after a sleeper was outlived and woken."""
        heard, told = spare.Pipe(duplex=False)
        sleeper = spare.Process(target=write, args=(redis.url, namespace, tmp_path / "markers", told))
        sleeper.start()
        told.close()
        try:
            assert await asyncio.to_thread(heard.recv) == "open"
            os.kill(sleeper.pid or 0, signal.SIGSTOP)
            heir = await heir_of(namespace)
            await heir.append(line(0))
            os.kill(sleeper.pid or 0, signal.SIGCONT)
            said = await asyncio.to_thread(rest, heard)
        finally:
            sleeper.kill()
            sleeper.join()
        assert "refused" in said
        assert "took over" in said
        count = heir._n
        await heir.close()
        after: list[Record] = []
        last = journal(redis, tmp_path, namespace)
        await last.open(after.append)
        await last.close()
        assert len(after) == count
        return after

    async def heir_of(namespace: str) -> RedisJournal:
        while True:
            heir = journal(redis, tmp_path, namespace)
            try:
                await heir.open(lambda record: None)
            except Unavailable:
                await asyncio.sleep(0.02)
            else:
                return heir

    async def five(namespace: str) -> None:
        for trial in range(5):
            records = await outlived(namespace)
            heirs = [record for record in records if "from" not in record.data]
            assert len(heirs) == trial + 1

    async def scenario() -> None:
        await asyncio.gather(*(five(f"tuft{i}") for i in range(4)))

    asyncio.run(scenario())


def test_what_one_server_made_the_next_one_on_the_namespace_reads(redis: RedisServer, tmp_path: Path) -> None:
    """S1-52, S1-48: create on one, read on the other, train on there, nothing executed twice."""

    async def scenario() -> None:
        async with world(tmp_path, journal=journal(redis, tmp_path)) as first:
            run = await first.connect()
            passes = await first.train(run, 4)
        async with world(tmp_path, journal=journal(redis, tmp_path)) as second:
            second.seq = first.seq
            assert second.service.state.runs[run].step == 4
            assert (await second.answer(passes[0])).body == b"done"
            passes += await second.train(run, 2)
            assert second.trained == stepped(passes)

    asyncio.run(asyncio.wait_for(scenario(), 30))
