"""Keys that a server issues: on record as digests, for as long as they are good."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.world import until
from tuft_jupyter.core.access import KeyRing, digest
from tuft_jupyter.core.errors import Forbidden, NotFound, UserError
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.keys import KeyBook
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.types import Principal, Record

OWNER, BOB, EVE = Principal("owner", admin=True), Principal("bob"), Principal("eve")


class Book:
    """A key book on a journal in memory, under a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.journal = MemoryJournal(lambda: self.now)
        self.records: list[Record] = []
        self.open()

    def open(self) -> None:
        """As a server does at its start: with what was recorded before."""
        self.ledger = Ledger(self.journal, lambda: self.now)
        self.ring = KeyRing(clock=lambda: self.now)
        self.book = KeyBook(self.ledger, self.ring, ("tml-server", OWNER), {"tml-given": BOB})

    async def restart(self) -> None:
        records = self.records[:]
        self.open()
        for record in records:
            self.ledger._follow(record)
        await self.start()
        self.book.recovered()

    async def start(self) -> None:
        def sink(record: Record) -> None:
            self.records.append(record)
            self.ledger._follow(record)

        await self.journal.open(sink)


def with_book(body: Callable[[Book], Awaitable[None]]) -> None:
    async def scenario() -> None:
        book = Book()
        await book.start()
        await body(book)

    asyncio.run(scenario())


def refused(book: Book, key: str) -> bool:
    try:
        book.ring.principal(key)
    except Forbidden:
        return True
    return False


def test_a_key_is_good_at_once_and_after_a_restart_and_never_on_record() -> None:
    """T7: digests only."""

    async def body(book: Book) -> None:
        key, kept = await book.book.create(OWNER, "bob", "laptop")
        assert key.startswith("tml-")
        assert book.ring.principal(key) == BOB
        assert kept.id in {each.id for each in book.book.listed(BOB)}
        assert key not in repr(book.records)
        assert key[4:] not in repr(book.records)
        await book.restart()
        assert book.ring.principal(key) == BOB
        assert book.book.listed(OWNER)[0] == kept

    with_book(body)


def test_a_revoked_key_stays_revoked_and_the_configuration_cannot_bring_it_back() -> None:
    async def body(book: Book) -> None:
        key, kept = await book.book.create(OWNER, "bob")
        given = next(each.id for each in book.book.listed(OWNER) if each.source == "configuration")
        for one in (kept.id, given):
            await book.book.revoke(OWNER, one)
        for _ in range(2):
            assert refused(book, key)
            assert refused(book, "tml-given")
            assert {each.revoked for each in book.book.listed(OWNER) if each.source != "server"} == {True}
            await book.restart()

    with_book(body)


def test_a_key_ends_when_its_time_comes_and_an_end_can_be_moved() -> None:
    """T7, F18."""

    async def body(book: Book) -> None:
        key, kept = await book.book.create(OWNER, "bob", seconds=60)
        told: list[str] = []
        with book.ring.active(key).in_use(lambda _: told.append("ended")):
            book.now += 59
            book.ring.expire()
            assert not told
            await book.book.expire(OWNER, kept.id, 10)
            book.now += 9
            assert book.ring.principal(key) == BOB
            book.now += 1
            assert refused(book, key)
            book.ring.expire()
        assert told == ["ended"]
        await book.restart()
        assert refused(book, key)
        await book.book.expire(OWNER, kept.id, None)
        assert book.ring.principal(key) == BOB

    with_book(body)


def test_only_admins_make_and_change_keys_and_others_revoke_their_own() -> None:
    async def body(book: Book) -> None:
        key, kept = await book.book.create(OWNER, "bob")
        before = len(book.records)
        with pytest.raises(Forbidden):
            await book.book.create(BOB, "bob")
        with pytest.raises(Forbidden):
            await book.book.expire(BOB, kept.id, None)
        said = []
        for one in (kept.id, "0123456789ab"):
            with pytest.raises(NotFound) as error:
                await book.book.revoke(EVE, one)
            said.append(str(error.value).replace(one, "X"))
        assert said[0] == said[1]
        assert book.book.listed(EVE) == []
        assert len(book.records) == before
        await book.book.revoke(BOB, kept.id)
        assert refused(book, key)

    with_book(body)


def test_the_server_s_own_key_and_strange_wishes_are_refused_with_a_reason() -> None:
    async def body(book: Book) -> None:
        own = next(each.id for each in book.book.listed(OWNER) if each.source == "server")
        with pytest.raises(UserError, match="own key"):
            await book.book.revoke(OWNER, own)
        for tenant in ("", "two words", "x" * 129, "tab\there"):
            with pytest.raises(UserError, match="tenant"):
                await book.book.create(OWNER, tenant)
        for seconds in (-1.0, 1e12, float("nan")):
            with pytest.raises(UserError, match="ttl_seconds"):
                await book.book.create(OWNER, "bob", seconds=seconds)
        with pytest.raises(UserError, match="not issued here"):
            await book.book.expire(OWNER, own, 5)

    with_book(body)


@pytest.mark.parametrize("wish", ["revoke", "expire"])
def test_a_key_that_is_ended_on_record_is_refused_although_nobody_waited_for_it(
    tmp_path: Path, wish: str
) -> None:
    """F18: whoever asked hung up while the disk was written, and the list says that the key is over."""

    async def scenario() -> None:
        ledger, ring = Ledger(SqliteJournal(tmp_path / "journal")), KeyRing()
        book = KeyBook(ledger, ring, ("tml-server", OWNER), {})
        await ledger.open()
        key, kept = await book.create(OWNER, "bob")
        ends = book.revoke(OWNER, kept.id) if wish == "revoke" else book.expire(OWNER, kept.id, 0.0)
        asked = asyncio.ensure_future(ends)
        await asyncio.sleep(0)
        asked.cancel()
        known = digest(key)
        async with asyncio.timeout(10):
            await until(lambda: known in ledger.state.revoked or ledger.state.keys[known].expires is not None)
            for _ in range(10):
                await asyncio.sleep(0)
        with pytest.raises(Forbidden):
            ring.principal(key)
        await ledger.close()

    asyncio.run(scenario())
