"""The journal in Redis: a real redis-server 7 that is stopped, killed and flushed."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
import redis as client

from tests.support.files import files_of_at_most
from tests.support.redis_journals import journal, line, numbers
from tests.support.redis_server import RedisServer
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.journal import Durability, Unavailable
from tuft_jupyter.core.journal_redis import RedisJournal

pytestmark = pytest.mark.usefixtures("short_lease")


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


def test_a_first_start_without_room_does_not_end_the_next_ones(redis: RedisServer, tmp_path: Path) -> None:
    """F12: the mark that this machine leaves of a namespace is whole, or is not there."""
    with files_of_at_most(0), pytest.raises(OSError, match="too large"):
        asyncio.run(numbers(journal(redis, tmp_path, "no-room")))
    assert asyncio.run(numbers(journal(redis, tmp_path, "no-room"))) == []


@pytest.mark.parametrize(
    ("options", "level", "words"),
    [
        ({"appendfsync": "always"}, Durability.MACHINE, "the machine"),
        ({"appendfsync": "everysec"}, Durability.PROCESS, "the last second"),
        ({"appendfsync": "no"}, Durability.PROCESS, "half minute"),
        ({"appendonly": "no"}, Durability.PROCESS, "restart of Redis loses everything"),
        (
            {"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"},
            Durability.PROCESS,
            "throws records away",
        ),
    ],
)
def test_how_much_redis_keeps_is_said_aloud(
    tmp_path: Path, options: dict[str, str], level: Durability, words: str
) -> None:
    """F7: an fsync weaker than always, or a cache, is told at the start and shown."""
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
