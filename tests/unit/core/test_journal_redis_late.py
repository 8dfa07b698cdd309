"""What reaches Redis late, or from a server that was outlived, changes nothing there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.redis_journals import journal, line, numbers
from tests.support.redis_server import RedisServer
from tuft_jupyter.core import journal_redis
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.journal import FOLDED, ReadOnly
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.types import Record


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


class SlowNetwork:
    """What is sent to Redis while ``holding`` arrives when :meth:`deliver` is called, though the sender has left."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.holding = False
        self.port = 0
        self._held: list[bytes] = []

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        yield
        server.close()

    async def _pass(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.redis.port)
        answers = asyncio.ensure_future(self._answers(reader, back))
        while data := await client.read(2**16):
            if self.holding:
                self._held.append(data)
            else:
                writer.write(data)
        answers.cancel()
        writer.close()

    async def _answers(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            back.write(data)

    async def deliver(self) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.redis.port)
        writer.write(b"".join(self._held))
        answer = await reader.read(2**16)
        writer.close()
        return answer


def test_a_compaction_that_lands_after_a_later_one_leaves_no_hole(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: the network delivers it after the server gave it up and compacted again."""
    monkeypatch.setattr(journal_redis, "PATIENCE", 0.5)

    async def scenario() -> None:
        network = SlowNetwork(redis)
        async with network.up():
            kept = RedisJournal(f"redis://127.0.0.1:{network.port}/0", "tuft", tmp_path / "markers")
            await kept.open(lambda record: None)
            for i in range(3):
                await kept.append(line(i))
            network.holding = True
            with pytest.raises(Overloaded):
                await kept.compact(2, '{"image":1}', [])
            network.holding = False
            for i in range(3, 6):
                await kept.append(line(i))
            await kept.compact(5, '{"image":2}', [])
            assert b"FENCED" in await network.deliver()
            await kept.close()
        told: list[Record] = []
        again = journal(redis, tmp_path)
        await again.open(told.append)
        assert [(record.kind, record.n) for record in told] == [(FOLDED, 5), ("op_accepted", 6)]
        assert told[0].data == {"image": 2}
        await again.close()

    asyncio.run(scenario())


def test_a_server_that_was_outlived_drops_nothing_of_its_heir(redis: RedisServer, tmp_path: Path) -> None:
    """F8: its numbers stand for other records now, where Redis lost what it had acknowledged meanwhile."""

    async def scenario() -> None:
        asleep = journal(redis, tmp_path)
        await asleep.open(lambda record: None)
        await asleep.append(line(0))
        await asleep.append(line(1, b"body"))
        asked = asleep._ask()
        await asked.delete(asleep.key("lease", "journal"))  # it was silent for longer than its lease
        heir = journal(redis, tmp_path)
        await heir.open(lambda record: None)
        with pytest.raises(ReadOnly, match="took over"):
            await asleep.drop_blobs([2])
        await asleep.drop_blobs([2])
        kept = await heir.read(2)
        assert kept is not None
        assert kept.blob == b"body"
        await heir.close()
        await asleep.close()
        assert await numbers(journal(redis, tmp_path)) == [1, 2]

    asyncio.run(scenario())


def test_who_waits_for_a_write_under_way_is_told_when_the_journal_is_closed(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: nobody is left waiting, and the record is there or not as after a crash."""
    monkeypatch.setattr(journal_redis, "PATIENCE", 0.5)

    async def scenario() -> None:
        kept = journal(redis, tmp_path)
        await kept.open(lambda record: None)
        redis.pause()
        waiting = asyncio.ensure_future(kept.append(line(0)))
        await asyncio.sleep(0.1)
        await kept.close()
        with pytest.raises(ServerError, match="closed"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())
