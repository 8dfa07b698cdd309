"""What was sampled is counted per hour, session and base model, and is told again after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.world import ALICE, BOB, scenario, until, world
from tuft_jupyter.core import usage
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.image import plain, state_of
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.state import State
from tuft_jupyter.core.types import Record


class FullJournal(MemoryJournal):
    """Takes nothing while it is ``full``."""

    full = False

    async def append(self, record: Record) -> Record:
        if self.full:
            raise Overloaded("the disk is full")
        return await super().append(record)


def used(state: State, tenant: str) -> dict[tuple[str, str], int]:
    buckets = usage.hourly(state, tenant, 0.0, 1e11)
    return {(bucket.kind, bucket.session): tokens for bucket, tokens in buckets}


def test_samples_count_for_their_session_and_nobody_else(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, journal=SqliteJournal(tmp_path / "journal")) as w:
            sampling = w.service.sampling
            session = await w.service.sessions.open(ALICE, {"tags": []})
            sampler = await sampling.open(ALICE, session, 0, w.service.catalog.resolve("tiny"), None)
            for seq in range(3):
                await w.answer(sampling.submit(ALICE, sampler.id, seq, b"{}"))
            assert used(w.service.state, ALICE.tenant) == {}
            await sampling.usage.flush()
            await sampling.usage.flush()  # what is on record is not counted twice
            expected = {("sampling_prefill", session): 9, ("sampling_sample", session): 12}
            assert used(w.service.state, ALICE.tenant) == expected
            assert used(w.service.state, BOB.tenant) == {}
            assert used(state_of(plain(w.service.state)), ALICE.tenant) == expected
            chunks = w.service.text.complete(ALICE, "tiny", b"{}", chat=False)
            assert [chunk async for chunk in chunks]
        async with world(
            tmp_path, journal=SqliteJournal(tmp_path / "journal")
        ) as again:  # what was not noted yet was noted by the stop
            told = used(again.service.state, ALICE.tenant)
            assert told == {**expected, ("sampling_prefill", ""): 5, ("sampling_sample", ""): 2}

    scenario(body)


def test_a_journal_that_takes_nothing_for_a_while_loses_no_tokens(tmp_path: Path) -> None:
    async def body() -> None:
        journal = FullJournal()
        async with world(tmp_path, journal=journal) as w:
            sampled = w.service.sampling.usage
            sampled.add("alice", "s", "tiny", {"prompt_tokens": 2, "tokens": 1})
            journal.full = True
            await sampled.flush()
            sampled.add("alice", "s", "tiny", {"prompt_tokens": 2, "tokens": 1})
            journal.full = False
            await sampled.flush()
            assert used(w.service.state, "alice") == {
                ("sampling_prefill", "s"): 4,
                ("sampling_sample", "s"): 2,
            }

    scenario(body)


class SlowJournal(MemoryJournal):
    """Takes nothing until the disk is ``there``; ``asked`` is what waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.there = asyncio.Event()
        self.asked = 0

    async def append(self, record: Record) -> Record:
        self.asked += 1
        await self.there.wait()
        return await super().append(record)


def test_who_reads_usage_while_it_is_put_on_record_misses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        journal = SlowJournal()
        journal.there.set()
        async with world(tmp_path, journal=journal) as w:
            sampled = w.service.sampling.usage
            sampled.add("alice", "s", "tiny", {"prompt_tokens": 2, "tokens": 1})
            journal.there.clear()
            before = journal.asked
            first = asyncio.create_task(sampled.flush())
            await until(lambda: journal.asked > before)
            second = asyncio.create_task(sampled.flush())
            await asyncio.sleep(0)
            assert not second.done()
            journal.there.set()
            await second
            assert used(w.service.state, "alice") == {
                ("sampling_prefill", "s"): 2,
                ("sampling_sample", "s"): 1,
            }
            await first

    scenario(body)
