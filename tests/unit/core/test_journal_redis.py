"""The journal in Redis: a real redis-server 7 that is stopped, killed, flushed and fought over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import redis as client

from tests.support.redis_server import RedisServer
from tests.support.sleeper import write
from tests.support.world import stepped, world
from tuft_jupyter.core import journal_redis, lease
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.journal import Durability, Unavailable
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.types import Record


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_redis, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(journal_redis, "PATIENCE", 0.5)


def line(i: int, blob: bytes | None = None, kind: str = "op_accepted") -> Record:
    return Record(kind, "alice", {"i": i, "request_id": f"r{i}"}, blob=blob)


def journal(redis: RedisServer, tmp_path: Path, namespace: str = "tuft", **more: int) -> RedisJournal:
    return RedisJournal(redis.url, namespace, tmp_path / "markers", **more)


async def numbers(opened: RedisJournal) -> list[int]:
    told: list[int] = []
    await opened.open(lambda record: told.append(record.n))
    await opened.close()
    return told


def test_keys_begin_with_the_namespace_and_results_expire(redis: RedisServer, tmp_path: Path) -> None:
    """S1-55, S1-61: ``{namespace}::{type}::{id}``; a result is kept for a day, an op's body until it is dropped."""

    async def scenario() -> None:
        kept = journal(redis, tmp_path, "tuft:ada")
        await kept.open(lambda record: None)
        await kept.append(line(1, b"body"))
        await kept.append(line(1, b"result", "op_done"))
        asked = client.Redis.from_url(redis.url)
        assert all(key.startswith(b"tuft:ada::") for key in asked.scan_iter())
        assert 86390 <= asked.ttl(kept.key("future", "2")) <= 86400
        assert asked.ttl(kept.key("op", "1")) == -1
        assert kept.key("run", "a::b") == "tuft:ada::run::a__SEP__b"
        asked.close()
        await kept.close()
        for_ever = RedisJournal(redis.url, "other", tmp_path / "markers", future_ttl=None)
        await for_ever.open(lambda record: None)
        await for_ever.append(line(1, b"result", "op_done"))
        asked = client.Redis.from_url(redis.url)
        assert asked.ttl("other::future::1") == -1
        asked.close()
        await for_ever.close()

    asyncio.run(scenario())


def test_a_paused_redis_means_come_back_later_and_nothing_is_lost_or_doubled(
    redis: RedisServer, tmp_path: Path
) -> None:
    """F7: while Redis hangs, requests are refused with the reason; what was refused is not there afterwards."""

    async def scenario() -> None:
        kept = journal(redis, tmp_path)
        seen: list[int] = []
        await kept.open(lambda record: seen.append(record.data["i"]))
        await kept.append(line(1))
        redis.pause()
        refused = await asyncio.gather(*(kept.append(line(i)) for i in (2, 3)), return_exceptions=True)
        assert all(isinstance(answer, Overloaded) for answer in refused)
        assert "Redis" in str(refused[0])
        redis.go_on()
        while True:
            try:
                record = await kept.append(line(4))
                break
            except Overloaded:
                continue
        assert record.n == 2  # what hung in the socket was undone
        assert seen == [1, 4]
        await kept.close()
        assert await numbers(journal(redis, tmp_path)) == [1, 2]

    asyncio.run(scenario())


def test_a_redis_that_was_killed_and_comes_back_has_everything_that_was_acknowledged(
    redis: RedisServer, tmp_path: Path
) -> None:
    """F7: with appendfsync always."""

    async def scenario() -> None:
        kept = journal(redis, tmp_path)
        await kept.open(lambda record: None)
        assert kept.durability is Durability.MACHINE
        for i in range(20):
            await kept.append(line(i, b"x" * 1000))
        redis.kill()
        with pytest.raises(Overloaded, match="Redis 127"):
            await kept.append(line(20))
        redis.start()
        assert (await kept.append(line(21))).n == 21
        found = await kept.read(5)
        assert found is not None
        assert found.blob == b"x" * 1000
        await kept.close()

    asyncio.run(scenario())


def test_an_emptied_redis_is_never_taken_for_a_new_one(redis: RedisServer, tmp_path: Path) -> None:
    """F7: FLUSHALL refuses the running server's writes and the next start, and says how to begin anew."""

    async def scenario() -> None:
        kept = journal(redis, tmp_path)
        await kept.open(lambda record: None)
        await kept.append(line(1))
        redis.flush()
        with pytest.raises(Overloaded, match="vanished"):
            await kept.append(line(2))
        assert "vanished" in kept.problem
        await kept.close()
        with pytest.raises(Unavailable, match="'tuft' vanished") as refused:
            await numbers(journal(redis, tmp_path))
        markers.append(Path(str(refused.value).rpartition(" ")[2]))

    markers: list[Path] = []
    asyncio.run(scenario())
    assert json.loads(markers[0].read_text())["namespace"] == "tuft"
    markers[0].unlink()
    assert asyncio.run(numbers(journal(redis, tmp_path))) == []


@pytest.mark.parametrize(
    ("options", "level", "words"),
    [
        ({"appendfsync": "always"}, Durability.MACHINE, "the machine"),
        ({"appendfsync": "everysec"}, Durability.PROCESS, "the last second"),
        ({"appendfsync": "no"}, Durability.PROCESS, "half minute"),
        ({"appendonly": "no"}, Durability.PROCESS, "restart of Redis loses everything"),
    ],
)
def test_how_much_redis_keeps_is_said_aloud(
    tmp_path: Path, options: dict[str, str], level: Durability, words: str
) -> None:
    """F7: an fsync weaker than always is told at the start and shown."""
    server = RedisServer(tmp_path / "redis", **options).start()

    async def scenario() -> None:
        kept = journal(server, tmp_path)
        await kept.open(lambda record: None)
        assert kept.durability is level
        assert words in kept.description
        await kept.close()

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


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


def test_a_redis_that_forgot_acknowledged_records_is_not_written_on(tmp_path: Path) -> None:
    """F7: after a crash of a Redis that does not sync, the running server stops and says what is missing."""
    server = RedisServer(tmp_path / "redis", appendonly="no").start()

    async def scenario() -> None:
        kept = journal(server, tmp_path)
        await kept.open(lambda record: None)
        await kept.append(line(1))
        asked = client.Redis.from_url(server.url)
        asked.save()
        asked.close()
        await kept.append(line(2))
        server.kill()
        server.start()
        with pytest.raises(Overloaded):  # the connection broke
            await kept.append(line(3))
        with pytest.raises(Overloaded, match="ends at record 1, not 2"):
            await kept.append(line(3))
        await kept.close()

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_without_the_client_the_start_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-50."""
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ServerError, match=r"tuft-jupyter\[persistence\]"):
        asyncio.run(numbers(RedisJournal("redis://127.0.0.1:1/0", "tuft", tmp_path)))


def test_the_password_in_the_address_is_never_told(tmp_path: Path) -> None:
    kept = RedisJournal("redis://:hunter2@127.0.0.1:1/0", "tuft", tmp_path)
    with pytest.raises(Unavailable) as refused:
        asyncio.run(numbers(kept))
    assert "hunter2" not in f"{refused.value} {kept.description}"


def test_the_tests_ran_against_redis_seven(redis: RedisServer) -> None:
    """S1-56: the version that the documentation starts."""
    asked = client.Redis.from_url(redis.url)
    assert asked.info("server")["redis_version"].startswith("7.")
    asked.close()


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
