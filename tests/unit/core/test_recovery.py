"""A recovery that is disturbed: the journal is told once, and what was accepted is run, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.redis_journals import journal
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import OneModel, ScriptedEngines
from tests.support.world import ALICE, BOB, SnapshotRule, World, scenario, until, world
from tuft_jupyter.core import journal_redis
from tuft_jupyter.core.driver import MAX_SERVERS
from tuft_jupyter.core.engine import Outcome, Task
from tuft_jupyter.core.errors import Lost, Overloaded, UserError
from tuft_jupyter.core.journal import Unavailable
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import ModelCard, Record


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


@pytest.mark.parametrize("told", [3, 1000], ids=["between two pages", "before the bodies are read"])
def test_a_redis_that_falls_silent_while_it_is_read_is_read_again_from_the_beginning(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    """F7, P1: nothing is begun before all is read, and nothing counts twice."""
    monkeypatch.setattr(journal_redis, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(journal_redis, "PATIENCE", 0.5)

    async def body() -> None:
        async with world(tmp_path, journal=journal(redis, tmp_path), rule=SnapshotRule(99, 1e9)) as w:
            run = await w.connect()
            passes = await w.train(run, 2)
            w.engines.trainer.gate.clear()
            waiting = [await w.forward_backward(run), await w.optim_step(run)]
            before = w.service.state.n
        monkeypatch.setattr(journal_redis, "PAGE", 1)
        kept = journal(redis, tmp_path)
        again = World(tmp_path, kept, ScriptedEngines(), SnapshotRule(99, 1e9))
        open_journal = kept.open

        async def disturbed(sink: journal_redis.Sink) -> None:
            def seen(record: Record) -> None:
                sink(record)
                if record.n == min(told, before):
                    redis.pause()

            await open_journal(seen)

        kept.open = disturbed  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="now"):
            await again.service.start()
        assert not again.engines.trainer.calls
        redis.go_on()
        kept.open = open_journal  # type: ignore[method-assign]
        while True:
            try:
                await again.service.start()
                break
            except Unavailable:  # the lease of the first try, or Redis has not noticed yet
                await asyncio.sleep(0.1)
        for request_id in waiting:
            assert not (await again.answer(request_id)).category
        assert again.service.state.runs[run].step == 3
        assert again.trained == [passes[0], "step", passes[1], "step", waiting[0], "step"]
        await again.service.stop()

    scenario(body)


def test_what_was_accepted_for_a_model_that_is_not_on_offer_is_told_why_and_comes_first_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1, P4: its operator took it out of the configuration; the owner adds it again."""

    async def body() -> None:
        path = tmp_path / "journal.sqlite"
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            first = await w.forward_backward(run, text="first:8")
        resolve = OneModel.resolve

        def withdrawn(self: OneModel, name: str) -> ModelCard:
            raise UserError(f"Base model {name!r} is not supported")

        monkeypatch.setattr(OneModel, "resolve", withdrawn)
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            assert "tiny is not on offer" in await w.service.queue_reason(ALICE, first)
            monkeypatch.setattr(OneModel, "resolve", resolve)
            w.seq = 1
            second = await w.forward_backward(run, text="second:8")
            for request_id in (second, first):
                assert not (await w.answer(request_id)).category
            assert w.trained == [first, second]

    scenario(body)


def test_a_step_whose_outcome_could_not_be_recorded_before_a_stop_is_in_no_snapshot(tmp_path: Path) -> None:
    """P1, F6: it is done again by the next server, so that it must not be there already."""

    async def body() -> None:
        path = tmp_path / "journal.sqlite"
        async with world(tmp_path, journal=SqliteJournal(path), rule=SnapshotRule(99, 1e9)) as w:
            run = await w.connect()
            await w.answer(await w.optim_step(run))
            append = w.service.ledger.journal.append

            async def full(record: Record) -> Record:
                if record.kind == "op_done":
                    raise Overloaded("the disk is full", retry_after=30.0)
                return await append(record)

            w.service.ledger.journal.append = full  # type: ignore[method-assign]
            last = await w.optim_step(run)
            await until(lambda: w.trained == ["step", "step"])
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            assert not (await w.answer(last)).category
            assert w.trained == ["step", "step"]

    scenario(body)


def test_a_sample_that_was_under_way_at_a_compaction_is_lost_in_a_restart_and_not_waited_for(
    tmp_path: Path,
) -> None:
    """P4: the SDK asks anew for what is lost (410); what is never drawn it would ask for without end (408)."""

    async def body() -> None:
        path = tmp_path / "journal.sqlite"
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            session = await w.service.sessions.open(ALICE, {"tags": []})
            card = w.service.catalog.resolve("tiny")
            sampler = await w.service.sampling.open(ALICE, session, 0, card, None)
            w.engines.sampler.gate.clear()
            sample = w.service.sampling.submit(ALICE, sampler.id, 0, b"{}")
            await w.service.ledger.compact()
            await w.service.ledger.close()  # as after a kill -9: nothing is written down at the end
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            with pytest.raises(Lost):
                await w.service.retrieve(ALICE, sample, 0.01)

    scenario(body)


class Container(ScriptedEngines):
    """Whatever runs in it has ended, as soon as its training worker is given the request ``fatal``: it hangs."""

    def __init__(self, fatal: str) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        work = self.trainer.step

        async def step(tasks: Sequence[Task]) -> list[Outcome]:
            if fatal in [task.request_id for task in tasks]:
                self.ended.set()
                await asyncio.Event().wait()
            return await work(tasks)

        self.trainer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("compacted", [False, True])
def test_a_request_that_ends_server_after_server_fails_alone(tmp_path: Path, compacted: bool) -> None:
    """F11, P1: memory runs out and everything in the container is killed, at each start anew; others lose nothing."""

    async def body() -> None:
        def kept() -> SqliteJournal:
            return SqliteJournal(tmp_path / "journal.sqlite")

        async with world(tmp_path, journal=kept()) as w:
            sick, healthy = await w.connect(), await w.connect(BOB)
            w.engines.trainer.gate.clear()
            fatal, bobs = await w.forward_backward(sick), await w.forward_backward(healthy, who=BOB)
            behind = await w.optim_step(sick)
        for server in range(MAX_SERVERS):
            container = Container(fatal)
            async with world(tmp_path, journal=kept(), engines=container) as w:
                await asyncio.wait_for(container.ended.wait(), 5)
                assert w.service.state.begun_again[fatal] == server + 1
                if compacted:
                    await w.service.ledger.compact()
        async with world(tmp_path, journal=kept(), engines=Container(fatal)) as w:
            answer = await w.answer(fatal)
            told = "the server ended 4 times while it had to run this request, so it is not tried again"
            assert (answer.category, answer.error) == ("server", told)
            for request_id, who in ((behind, ALICE), (bobs, BOB)):
                assert not (await w.answer(request_id, who)).category
            assert (w.service.state.begun_again, w.service.state.accepted) == ({}, {})

    scenario(body)


def test_what_waited_while_servers_were_restarted_is_not_suspected(tmp_path: Path) -> None:
    """P1: a request whose turn never came has ended nobody, however many servers it has seen."""

    async def body() -> None:
        def kept() -> SqliteJournal:
            return SqliteJournal(tmp_path / "journal.sqlite")

        async with world(tmp_path, journal=kept()) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            waiting = await w.forward_backward(run)
        for _ in range(MAX_SERVERS + 2):
            engines = ScriptedEngines()
            engines.trainer.fails_to_start = 99
            async with world(tmp_path, journal=kept(), engines=engines) as w:
                await until(lambda: "tiny" in w.service.drivers)
        async with world(tmp_path, journal=kept()) as w:
            assert not w.service.state.begun_again
            assert not (await w.answer(waiting)).category

    scenario(body)
