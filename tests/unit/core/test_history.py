"""What is over leaves the record after a while; what somebody can go on with, and what was used, does not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.soak import small, soak
from tests.support.world import ALICE, BOB, World, scenario, world
from tuft_jupyter.core import usage
from tuft_jupyter.core.errors import NotFound, UserError
from tuft_jupyter.core.image import plain, state_of
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.quotas import Limits, Quota, Quotas
from tuft_jupyter.core.types import CheckpointKind

DAY = 86400.0


def later(w: World) -> list[float]:
    """A clock that the test puts forward."""
    moved, steady = [0.0], w.service.ledger.clock
    w.service.ledger.clock = lambda: steady() + moved[0]
    return moved


async def unload(w: World, run: str, finished: bool = True) -> None:
    await w.answer(await w.service.runs.unload(ALICE, run, b"unload"))
    if finished:
        await w.service.finish_session(ALICE, run.split(":")[0], "success", None)


async def sweep(w: World, times: int = 2) -> None:
    """Sessions that fell silent are finished by the first one, and forgotten by the next."""
    for _ in range(times):
        await w.service.sweep(w.service.ledger.clock())


def used(w: World) -> dict[tuple[float, str], int]:
    """Trained and sampled tokens by hour and kind, whatever the session."""
    found: dict[tuple[float, str], int] = {}
    for bucket, tokens in usage.hourly(w.service.state, ALICE.tenant, 0.0, 1e11):
        key = (bucket.start, bucket.kind)
        found[key] = found.get(key, 0) + tokens
    return found


def test_what_is_over_leaves_after_a_month_and_what_it_used_stays(tmp_path: Path) -> None:
    """L7: from memory, from the journal, and from what the panel shows; nobody's connected client notices."""

    async def body() -> None:
        journal = tmp_path / "journal.sqlite"
        async with world(tmp_path, journal=SqliteJournal(journal)) as w:
            moved = later(w)
            run, silent = await w.connect(), await w.connect()
            for each in (run, silent):
                await w.train(each, 5)
            asked = await w.service.runs.save_for_sampling_session(ALICE, run, 90, 0, b"e")
            await w.answer(asked)
            await w.answer(w.service.sampling.submit(ALICE, f"{run.split(':')[0]}:sample:0", 0, b"{}"))
            await unload(w, run)
            await unload(w, silent, finished=False)
            connected = await w.service.sessions.open(ALICE, {"tags": []})
            await sweep(w)
            before = used(w)
            assert len(w.service.state.runs) == 2, "not before its time"
            moved[0] += 31 * DAY
            w.service.sessions.heartbeat(ALICE, connected)
            await sweep(w)
            state = w.service.state
            assert (set(state.sessions), state.runs, state.samplers) == ({connected}, {}, {})
            assert used(w) == before
            assert state_of(plain(state)) == state
            with pytest.raises(NotFound):
                w.service.runs.get(ALICE, run)
            await w.service.ledger.compact()
        assert run not in journal.read_bytes().decode("latin-1")
        async with world(tmp_path, journal=SqliteJournal(journal)) as again:
            assert (set(again.service.state.sessions), used(again)) == ({connected}, before)

    scenario(body)


def test_what_somebody_can_go_on_with_never_leaves(tmp_path: Path) -> None:
    """L7: a run that can be resumed, one with a checkpoint, and the sessions they came from; for ever if so set."""

    async def body() -> None:
        async with world(tmp_path) as w:
            moved = later(w)
            resumable, kept = await w.connect(), await w.connect()
            for run in (resumable, kept):
                await w.train(run, 2)
            asked = await w.service.runs.save_weights(ALICE, kept, 99, "a", CheckpointKind.TRAINING, b"s")
            await w.answer(asked)
            await unload(w, kept)
            moved[0] += 400 * DAY
            await sweep(w, 3)
            assert set(w.service.state.runs) == {resumable, kept}
            new = await w.service.sessions.open(ALICE, {"tags": []})
            await w.service.runs.resume(ALICE, resumable, new)
            await w.train(resumable, 1)
            await w.service.checkpoints.delete(ALICE, f"tinker://{kept}/weights/a")
            await sweep(w)
            assert set(w.service.state.runs) == {resumable}
        async with world(tmp_path, limits=Limits(history=0.0)) as w:
            moved = later(w)
            await unload(w, await w.connect())
            moved[0] += 400 * DAY
            await sweep(w)
            assert (len(w.service.state.runs), len(w.service.state.sessions)) == (1, 1)

    scenario(body)


def test_a_tenant_has_so_many_sessions_and_silent_ones_do_not_count(tmp_path: Path) -> None:
    """T12: of ten that are opened at once exactly so many; others have their own."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(sessions=3))) as w:
            moved = later(w)
            sessions = w.service.sessions
            asked = [sessions.open(ALICE, {"tags": []}) for _ in range(10)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            refused = [each for each in found if isinstance(each, UserError)]
            assert len(refused) == 7
            assert "Session limit exceeded: 3/3" in str(refused[0])
            await sessions.open(BOB, {"tags": []})
            opened = [each for each in found if isinstance(each, str)]
            await w.service.finish_session(ALICE, opened[0], "success", None)
            await sessions.open(ALICE, {"tags": []})
            with pytest.raises(UserError):
                await sessions.open(ALICE, {"tags": []})
            moved[0] += 2000.0
            await sessions.open(ALICE, {"tags": []})
            assert len(w.service.state.sessions) == 6, "a refused one leaves no trace"

    scenario(body)


def test_a_tenant_s_weights_for_sampling_have_so_many_places_and_a_loop_goes_on(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(samplers=3))) as w:

            async def save(run: str, seq: int) -> Path:
                asked = await w.service.runs.save_for_sampling_session(ALICE, run, seq, seq, b"e%d" % seq)
                assert not (await w.answer(asked)).category
                return Path(w.service.state.samplers[f"{run.split(':')[0]}:sample:{seq}"].directory or "")

            loop, other = await w.connect(), await w.connect()
            saved = [await save(loop, seq) for seq in range(1, 8)]
            await w.service.sweep(0.0)
            assert [each.is_dir() for each in saved] == [False] * 4 + [True] * 3
            before = w.service.state.n
            with pytest.raises(UserError, match="Sampler limit exceeded: 3/3"):
                await save(other, 1)
            assert w.service.state.n == before
            await w.service.finish_session(ALICE, loop.split(":")[0], "success", None)
            assert (await save(other, 1)).is_dir()

    scenario(body)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_months_of_visits_leave_nothing_that_grows(tmp_path: Path) -> None:
    """L7: in small; a hundred times as much: ``make soak``."""
    found = asyncio.run(soak(tmp_path, rounds=60, ops=24, hours=72.0))
    grown = [end - warm for warm, end in zip(found.warm, found.end, strict=True)]
    assert max(grown) < 10, "descriptors, threads, tasks: other tests' clients in this process may open a few"
    assert max(found.objects[len(found.objects) // 2 :]) <= max(found.objects[: len(found.objects) // 2])
    assert small(found), (found.file, found.grown, found.live)
