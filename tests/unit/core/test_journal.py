"""What an append promises, for every kind of journal."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.files import files_of_at_most
from tests.support.redis_server import RedisServer
from tuft_jupyter.core import journal_sqlite
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.journal import Journal, MemoryJournal, ReadOnly, Unavailable
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import Record

Make = Callable[[], Journal]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return MemoryJournal
    if request.param == "sqlite":
        return lambda: SqliteJournal(tmp_path / "journal.sqlite")
    server: RedisServer = request.getfixturevalue("redis")
    return lambda: RedisJournal(server.url, tmp_path.name, tmp_path / "markers")


def line(i: int, blob: bytes | None = None) -> Record:
    return Record("op_accepted", "alice", {"i": i}, blob=blob)


def test_records_are_numbered_without_holes_and_seen_in_order_before_append_returns(make: Make) -> None:
    async def scenario() -> None:
        journal, seen = make(), []
        await journal.open(lambda record: seen.append(record.n))

        async def append(i: int) -> None:
            record = await journal.append(line(i))
            assert record.n in seen

        await asyncio.gather(*(append(i) for i in range(50)))
        assert seen == list(range(1, 51))
        await journal.close()

    asyncio.run(scenario())


def test_a_record_that_cannot_be_applied_fails_its_own_append_and_no_other(make: Make) -> None:
    async def scenario() -> None:
        journal, seen = make(), []

        def apply(record: Record) -> None:
            if record.data["i"] == 2:
                raise ZeroDivisionError
            seen.append(record.data["i"])

        await journal.open(apply)
        appended = await asyncio.gather(*(journal.append(line(i)) for i in (1, 2, 3)), return_exceptions=True)
        assert isinstance(appended[1], ZeroDivisionError)
        assert [each.n for each in appended if isinstance(each, Record)] == [1, 3]
        assert (await journal.append(line(4))).n == 4
        assert seen == [1, 3, 4]
        await journal.close()

    asyncio.run(scenario())


def test_reading_a_record_does_not_tell_it_again(make: Make) -> None:
    async def scenario() -> None:
        journal, seen = make(), []
        await journal.open(lambda record: seen.append(record.n))
        record = await journal.append(line(1, b"body"))
        await journal.read(record.n)
        assert seen == [1]
        await journal.close()

    asyncio.run(scenario())


def test_a_blob_can_be_read_back_until_it_is_dropped(make: Make) -> None:
    async def scenario() -> None:
        journal = make()
        await journal.open(lambda record: None)
        record = await journal.append(line(1, b"body"))
        found = await journal.read(record.n)
        assert found is not None
        assert found.blob == b"body"
        assert found.data == {"i": 1}
        await journal.drop_blobs([record.n])
        left = await journal.read(record.n)
        assert left is None or left.blob is None
        await journal.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("make", ["sqlite", "redis"], indirect=True)
def test_a_reopened_journal_tells_everything_again_and_goes_on_counting(make: Make) -> None:
    async def scenario() -> None:
        first = make()
        await first.open(lambda record: None)
        for i in range(5):
            await first.append(line(i, b"x"))
        await first.close()
        told: list[Record] = []
        second = make()
        await second.open(told.append)
        assert [record.data["i"] for record in told] == [0, 1, 2, 3, 4]
        assert (await second.append(line(5))).n == 6
        await second.close()

    asyncio.run(scenario())


def test_an_appended_record_survives_kill_9(tmp_path: Path) -> None:
    script = """
import asyncio, os, signal, sys
from pathlib import Path
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import Record
async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.open(lambda record: None)
    for i in range(20):
        await journal.append(Record("k", "t", {"i": i}))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    path = tmp_path / "j.sqlite"
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=os.environ, check=False)
    assert done.returncode == -9

    async def count() -> int:
        told: list[Record] = []
        journal = SqliteJournal(path)
        await journal.open(told.append)
        await journal.close()
        return len(told)

    assert asyncio.run(count()) == 20


def test_a_second_server_on_the_same_file_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = SqliteJournal(tmp_path / "j.sqlite")
        await first.open(lambda record: None)
        second = SqliteJournal(tmp_path / "j.sqlite")
        with pytest.raises(ServerError, match=f"process {os.getpid()}"):
            await second.open(lambda record: None)
        await first.close()
        await second.open(lambda record: None)
        await second.close()

    asyncio.run(scenario())


def test_a_file_system_without_locks_is_named_and_no_other_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Homes of clusters are often on one; there is no other server that could be stopped."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal_sqlite.fcntl, "flock", refused)
    with pytest.raises(Unavailable, match=r"cannot be locked \(No locks available\).*persistence\.file_path"):
        asyncio.run(SqliteJournal(tmp_path / "journal.sqlite").open(lambda _: None))


def test_a_record_that_cannot_be_written_leaves_nothing_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """F6: a full disk refuses new work with a reason, and needs no restart."""

    async def scenario() -> None:
        path = tmp_path / "j.sqlite"
        seen: list[int] = []
        journal = SqliteJournal(path)
        await journal.open(lambda record: seen.append(record.n))
        await journal.append(line(1))
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute(
            "CREATE TRIGGER full BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
        with pytest.raises(Overloaded, match="disk full"):
            await journal.append(line(2))
        blocker.execute("DROP TRIGGER full")
        blocker.close()
        assert (await journal.append(line(3))).n == 2
        assert seen == [1, 2]
        await journal.close()

    asyncio.run(scenario())


def test_a_start_without_room_is_tried_again_and_says_nothing_of_damage(tmp_path: Path) -> None:
    """F6: what a crash left in the log has no room in the file now; when there is some, all of it is there."""
    live, crashed = tmp_path / "live", tmp_path / "crashed"
    live.mkdir()

    async def scenario() -> None:
        journal = SqliteJournal(live / "j.sqlite")
        await journal.open(lambda record: None)
        for i in range(9):
            await journal.append(line(i, blob=b"x" * 5000))
        shutil.copytree(live, crashed)
        await journal.close()
        again = SqliteJournal(crashed / "j.sqlite")
        with files_of_at_most(20_000), pytest.raises(Unavailable, match="cannot be opened now"):
            await again.open(lambda record: None)
        told: list[int] = []
        await again.open(lambda record: told.append(record.n))
        assert (told, again.problem) == (list(range(1, 10)), "")
        await again.close()

    asyncio.run(scenario())


def test_damage_that_there_was_no_room_to_note_is_damage_all_the_same(tmp_path: Path) -> None:
    """F5, F6: the note beside the file is empty."""

    async def scenario() -> None:
        (tmp_path / "j.sqlite").write_bytes(b"no database at all" * 300)
        journal = SqliteJournal(tmp_path / "j.sqlite")
        with files_of_at_most(0):
            await journal.open(lambda record: None)
        assert "not a database" in journal.problem
        with pytest.raises(ReadOnly):
            await journal.append(line(1))
        await journal.close()

    asyncio.run(scenario())


OUT_OF_MEMORY = """
import asyncio, sqlite3, sys
from pathlib import Path
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import Record

async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.open(lambda record: None)
    await journal.append(Record("kind", "alice", {}))
    sqlite3.connect(":memory:").execute("PRAGMA hard_heap_limit=3000000")
    try:
        await asyncio.wait_for(journal.append(Record("kind", "alice", {}, blob=bytes(5_000_000))), 20)
    except Overloaded:
        print((await asyncio.wait_for(journal.append(Record("kind", "alice", {})), 20)).n)

asyncio.run(main())
"""


def test_a_record_that_memory_does_not_suffice_for_is_refused_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    """P4: whoever appends gets an answer."""
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "j.sqlite")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stdout == "2\n", ended.stderr[-500:]


def test_a_record_with_a_number_that_json_lacks_fails_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = SqliteJournal(tmp_path / "j.sqlite")
        await journal.open(lambda record: None)
        with pytest.raises(ValueError, match="JSON"):
            await journal.append(Record("k", "t", {"loss": float("nan")}))
        assert (await journal.append(line(1))).n == 1
        await journal.close()

    asyncio.run(scenario())


def test_an_image_stands_for_the_records_before_it(make: Make) -> None:
    """L7: after a compaction the journal tells the image and what came later; kept bodies stay readable."""

    async def scenario() -> None:
        first = make()
        await first.open(lambda record: None)
        for i in range(5):
            await first.append(line(i, f"body {i}".encode()))
        assert first.weight[0] > 0
        await first.compact(4, '{"all":"of it"}', {2})
        kept, gone, later = await first.read(2), await first.read(3), await first.read(5)
        assert kept is not None
        assert later is not None
        assert (kept.blob, gone, later.blob) == (b"body 1", None, b"body 4")
        await first.append(line(5))
        await first.close()
        if isinstance(first, MemoryJournal):
            return
        told: list[Record] = []
        second = make()
        await second.open(told.append)
        assert [(record.kind, record.n) for record in told] == [
            ("folded", 4), ("op_accepted", 5), ("op_accepted", 6)
        ]  # fmt: skip
        assert told[0].data == {"all": "of it"}
        assert second.weight[1] > 0
        assert (await second.append(line(6))).n == 7
        await second.close()

    asyncio.run(scenario())
