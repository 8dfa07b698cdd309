"""What a journal may forget: records that an image stands for, results that were fetched, files that nobody reads."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer
from tests.support.world import ALICE, World, scenario, stepped, until, world
from tuft_jupyter.core import ledger as ledgers
from tuft_jupyter.core import state as fold
from tuft_jupyter.core.errors import Lost
from tuft_jupyter.core.image import plain, state_of
from tuft_jupyter.core.journal import Journal
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.promises import Answer, Promises
from tuft_jupyter.core.types import CheckpointKind, Record

GOLDEN = Path(__file__).parents[2] / "golden"
Make = Callable[[], Journal]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "sqlite":
        return lambda: SqliteJournal(tmp_path / "journal.sqlite")
    server: RedisServer = request.getfixturevalue("redis")
    return lambda: RedisJournal(server.url, tmp_path.name, tmp_path / "markers")


def there(directory: str) -> bool:
    return Path(directory).is_dir()


async def save(w: World, run: str, name: str = "a") -> str:
    """Save a training checkpoint; returns its directory."""
    w.seq += 1
    path = f"tinker://{run}/weights/{name}"
    asked = await w.service.runs.save_weights(
        ALICE, run, w.seq, name, CheckpointKind.TRAINING, b"s%d" % w.seq
    )
    assert not (await w.answer(asked)).category
    return w.service.state.checkpoints[path].directory


def test_a_state_made_from_its_image_goes_on_like_the_original() -> None:
    """L7: whatever record the image was made after."""
    records = [Record(**json.loads(line)) for line in (GOLDEN / "journal.jsonl").read_text().splitlines()]
    for at in range(len(records)):
        made = state_of(json.loads(json.dumps(plain(fold.fold(records[:at])))))
        for record in records[at:]:
            fold.apply(made, record)
        assert made == fold.fold(records), f"image after record {at}"


def test_who_listens_while_the_journal_is_read_is_told_to_fetch_the_state(make: Make, tmp_path: Path) -> None:
    """L7, P1: no record tells what the image holds; a page that was quicker than the start would lack all of it."""

    async def body() -> None:
        async with world(tmp_path, journal=make()) as w:
            await w.connect()
            await w.service.ledger.compact()
        ledger = ledgers.Ledger(make())
        early = ledger.feed.subscribe(None)
        await ledger.open()
        await asyncio.wait_for(early.take(), 5)
        assert ledger.state.runs
        assert early.overflowed
        await ledger.close()

    scenario(body)


def test_who_listens_while_a_journal_without_an_image_is_read_hears_all_of_it(
    make: Make, tmp_path: Path
) -> None:
    """L7: the first start of a server sends no page that is already open for its state a second time."""

    async def body() -> None:
        async with world(tmp_path, journal=make()) as w:
            await w.connect()
        ledger = ledgers.Ledger(make())
        early = ledger.feed.subscribe(None)
        await ledger.open()
        heard = [record.n for record in await asyncio.wait_for(early.take(), 5)]
        assert (heard, early.overflowed) == (list(range(1, ledger.state.n + 1)), False)
        await ledger.close()

    scenario(body)


def test_after_a_compaction_and_a_restart_everything_goes_on(make: Make, tmp_path: Path) -> None:
    """L7, P1: results, repeated requests, the op that was under way, the run's state and its checkpoints."""

    async def body() -> None:
        async with world(tmp_path, journal=make()) as w:
            run = await w.connect()
            passes = await w.train(run, 5)
            directory = await save(w, run)
            w.engines.trainer.gate.clear()
            waiting = await w.forward_backward(run, text="last:8")
            await w.service.ledger.compact()
            later = await w.optim_step(run)
            w.engines.trainer.gate.set()
            await w.service.ledger.close()  # as after a kill -9: nothing is written down at the end
        async with world(tmp_path, journal=make()) as w:
            w.seq = 12
            again = await w.service.runs.forward_backward(ALICE, run, 12, 8, b"last:8", "x", backward=True)
            assert again == waiting
            assert not (await w.answer(later)).category
            for request_id in (*passes, waiting):
                assert (await w.answer(request_id)).body == b"done"
            assert w.trained == stepped([*passes, waiting])
            found = w.service.state.runs[run]
            assert (found.step, len(found.curve["loss"]), found.pending) == (6, 6, 0)
            assert w.service.state.checkpoints[f"tinker://{run}/weights/a"].directory == directory

    scenario(body)


@pytest.mark.slow
def test_the_file_stays_below_twice_what_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L7: after many steps, with the maintenance that a server does by itself."""
    monkeypatch.setattr(ledgers, "SLACK", 4096)
    path = tmp_path / "journal.sqlite"

    async def body() -> None:
        clock = [1000.0]
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            w.service.ledger.clock = lambda: clock[0]
            run = await w.connect()
            for _ in range(40):
                await w.train(run, 10)
                clock[0] += 700.0
                await w.service.sweep(clock[0])
            live = len(json.dumps(plain(w.service.state))) + len(
                json.dumps(w.service.ledger.seen.image({run}))
            )
        db = sqlite3.connect(path)
        (records,) = db.execute("SELECT sum(length(data)) FROM records").fetchone()
        (image,) = db.execute("SELECT sum(length(data)) FROM image").fetchone()
        (blobs,) = db.execute("SELECT coalesce(sum(length(blob)), 0) FROM blobs").fetchone()
        db.close()
        assert records + image + blobs < 2 * live + 4096
        (pages,) = sqlite3.connect(path).execute("PRAGMA page_count").fetchone()
        assert pages * 4096 < 3 * live + 100_000

    scenario(body)


def test_a_result_waits_a_day_for_its_client_and_ten_minutes_after_it_was_fetched(
    make: Make, tmp_path: Path
) -> None:
    """L8, S1-61: in the journal as in memory."""

    async def body() -> None:
        clock = [1000.0]
        async with world(tmp_path, journal=make()) as w:
            w.service.ledger.clock = lambda: clock[0]
            run = await w.connect()
            left, had = await w.forward_backward(run), await w.forward_backward(run)
            await w.answer(had)
            answers = w.service.ledger.promises
            record = answers.get(ALICE, left).answer.record  # type: ignore[union-attr]
            clock[0] += 700.0
            await w.service.ledger.tidy()
            with pytest.raises(Lost):
                answers.get(ALICE, had)
            assert answers.get(ALICE, left).answer is not None
            clock[0] += 86400.0
            await w.service.ledger.tidy()
            with pytest.raises(Lost):
                answers.get(ALICE, left)
            found = await w.service.ledger.journal.read(record)
            assert found is None or found.blob is None

    scenario(body)


def test_a_client_that_slept_when_its_answer_came_still_gets_it(tmp_path: Path) -> None:
    """P1: a laptop's lid is closed while its request is held; the answer went to a connection that nobody read."""

    async def body() -> None:
        clock = [1000.0]
        async with world(tmp_path) as w:
            w.service.ledger.clock = lambda: clock[0]
            run = await w.connect()
            w.service.sessions.heartbeat(ALICE, w.service.state.runs[run].session)
            slept = await w.forward_backward(run)
            clock[0] += 1.0
            await w.answer(slept)
            for _ in range(8):
                clock[0] += 3600.0
                await w.service.ledger.tidy()
            w.service.sessions.heartbeat(ALICE, w.service.state.runs[run].session)
            clock[0] += 300.0
            await w.service.ledger.tidy()
            assert not (await w.answer(slept)).category
            clock[0] += 700.0
            await w.service.ledger.tidy()
            with pytest.raises(Lost):
                await w.answer(slept)

    scenario(body)


def test_beyond_the_cap_samples_are_dropped_and_training_results_read_back() -> None:
    """L8: the oldest first; what the journal holds is only let out of memory."""
    promises = Promises(capacity=100)
    for name, record in (("trained", 7), ("sampled", 0), ("newer", 8)):
        promises.open(name, "alice", "r")
        promises.settle(name, Answer(b"x" * 60, record=record))
    trained = promises.get(ALICE, "trained").answer
    assert trained is not None
    assert (trained.body, trained.record) == (None, 7)
    with pytest.raises(Lost):
        promises.get(ALICE, "sampled")


def test_saving_under_the_same_name_removes_the_old_files(tmp_path: Path) -> None:
    """But not while an op that loads them has not been made independent of them."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 1)
            first = await save(w, run)
            w.engines.trainer.gate.clear()
            loading = await w.service.runs.load_weights(
                ALICE, run, 50, f"tinker://{run}/weights/a", True, b"load"
            )
            await w.service.sweep(0.0)
            assert there(first)
            w.engines.trainer.gate.set()
            assert not (await w.answer(loading)).category
            second = await save(w, run)
            await w.train(run, 3)  # with a snapshot
            await until(lambda: not w.service.state.runs[run].sources)
            await w.service.sweep(0.0)
            assert not there(first)
            assert there(second)
            assert not w.service.state.garbage

    scenario(body)


def test_a_request_that_is_sent_twice_at_once_is_answered_when_it_is_durable(tmp_path: Path) -> None:
    """F6, F13: neither of the two hears of an op that could still be refused."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            journal = w.service.ledger.journal
            append, gate = journal.append, asyncio.Event()

            async def slow(record: Record) -> Record:
                await gate.wait()
                return await append(record)

            journal.append = slow  # type: ignore[method-assign]
            runs = w.service.runs
            asked = [
                asyncio.ensure_future(runs.forward_backward(ALICE, run, 9, 8, b"x:8", "x", backward=True))
                for _ in range(3)
            ]
            asked[0].cancel()  # the first client goes away: its op is neither lost nor doubled
            for _ in range(20):
                await asyncio.sleep(0)
            assert not asked[1].done()
            gate.set()
            one, two = await asked[1], await asked[2]
            assert one == two
            assert (await w.answer(one)).body == b"done"
            assert w.trained == [one]

    scenario(body)


def test_a_journal_of_version_0_1_tells_the_same_today(tmp_path: Path) -> None:
    """F17: a file with every kind of record of that version; the op that was under way is run."""
    path = tmp_path / "journal.sqlite"
    db = sqlite3.connect(path)
    db.executescript((GOLDEN / "journals" / "0.1.sql").read_text().replace("/home/", f"{tmp_path}/"))
    db.execute("PRAGMA journal_mode=WAL")
    db.close()

    async def body() -> None:
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            runs = sorted(w.service.state.runs.values(), key=lambda run: run.step)
            assert [(run.step, run.status) for run in runs] == [(2, "ready"), (4, "ready")]
            (checkpoint,) = w.service.state.checkpoints.values()
            assert (checkpoint.name, checkpoint.public, checkpoint.step) == ("final", True, 4)
            assert {s.finished for s in w.service.state.sessions.values()} == {None, "done"}
            assert w.service.state.revoked == {"d" * 64}
            (waiting,) = w.service.state.accepted
            await w.answer(waiting)
            await w.service.ledger.compact()
        shown = fold.fold([])
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            assert len(w.service.state.runs) == 2
            assert w.service.state != shown

    scenario(body)
