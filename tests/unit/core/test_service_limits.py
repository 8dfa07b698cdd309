"""What a tenant may hold, and for how long: places, idle runs, lifetimes, checkpoints."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.world import ALICE, BOB, LORA, World, scenario, until, world
from tuft_jupyter.core.errors import Overloaded, UserError
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.quotas import Limits, Quota, Quotas
from tuft_jupyter.core.types import CheckpointKind, Principal

OWNER = Principal("owner", admin=True)


async def create(here: World, session: str, number: int, who: Principal = ALICE) -> str:
    body = f"create{session}{number}".encode()
    made = await here.service.runs.create_model(who, session, number, "tiny", LORA, {}, body)
    await here.answer(made, who)
    return f"{session}:train:{number}"


async def unload(here: World, run: str, who: Principal = ALICE) -> None:
    await here.answer(await here.service.runs.unload(who, run, b"unload"), who)


def test_S2_29_per_token_model_limit(tmp_path: Path) -> None:
    """S2-29: three runs, the fourth is refused, one is unloaded, and it goes on."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(runs=3))) as here:
            session = await here.service.sessions.open(ALICE, {"tags": []})
            runs = [await create(here, session, n) for n in range(3)]
            with pytest.raises(UserError, match="Model limit exceeded: 3/3"):
                await create(here, session, 3)
            await create(here, await here.service.sessions.open(BOB, {"tags": []}), 0, BOB)
            await unload(here, runs[1])
            await create(here, session, 4)

    scenario(body)


def test_of_ten_creates_at_once_exactly_three_pass_whatever_their_sessions(tmp_path: Path) -> None:
    """S2-29, T12: per tenant, not per key or session."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(runs=3))) as here:
            sessions = [await here.service.sessions.open(ALICE, {"tags": []}) for _ in range(10)]
            outcomes = await asyncio.gather(
                *(create(here, session, 0) for session in sessions), return_exceptions=True
            )
            assert sum(isinstance(outcome, str) for outcome in outcomes) == 3
            assert sum("Model limit exceeded: 3/3" in str(outcome) for outcome in outcomes) == 7
            assert len(here.service.state.runs) == 3

    scenario(body)


def test_a_base_model_with_all_places_taken_says_so_until_one_is_free(tmp_path: Path) -> None:
    """S2-47."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(max_loras=1)) as here:
            run = await here.connect(ALICE)
            with pytest.raises(UserError, match=r"paused_capacity.*1 of 1"):
                await here.connect(BOB)
            await unload(here, run)
            await here.connect(BOB)

    scenario(body)


def test_an_idle_run_leaves_the_worker_and_its_place_and_comes_back_whole(tmp_path: Path) -> None:
    """S2-45: idle is no heartbeat and no op; an active run is never sent away. The next op is not refused, as there,
    but brings the state back; it is refused only where somebody else has the place by then.
    """
    limits = Limits(idle_timeout=30.0)

    async def body() -> None:
        async with world(tmp_path, limits=limits, quotas=Quotas(Quota(runs=1))) as here:
            now = [here.service.ledger.clock()]
            here.service.ledger.clock = lambda: now[0]
            idle = await here.connect(ALICE)
            await here.train(idle, 2)
            lane = here.service.drivers["tiny"].lanes.by_run[idle]
            before = here.trained[:]
            now[0] += 25
            here.service.sessions.heartbeat(ALICE, idle.split(":")[0])
            now[0] += 25
            await here.service.sweep(now[0])
            assert lane.resident
            with pytest.raises(UserError, match="1/1"):
                await here.connect(ALICE)
            now[0] += 31
            await here.service.sweep(now[0])
            await until(lambda: not lane.resident)
            other = await here.connect(ALICE)
            with pytest.raises(UserError, match="1/1"):
                await here.forward_backward(idle)
            await unload(here, other)
            await here.train(idle, 1)
            assert here.engines.trainer.runs[idle][: len(before)] == before

    scenario(body)


def test_workers_that_nobody_uses_end_and_come_back_with_the_next_request(tmp_path: Path) -> None:
    """S1-70: their GPU is free meanwhile. A heartbeat, a request that waits and a sample under way keep them."""

    async def body() -> None:
        async with world(tmp_path, limits=Limits(idle_timeout=30.0)) as here:
            now = [here.service.ledger.clock()]
            here.service.ledger.clock = lambda: now[0]
            run = await here.connect(ALICE)
            session = run.split(":")[0]
            await here.train(run, 2)
            card = here.service.catalog.resolve("tiny")
            sampler = await here.service.sampling.open(ALICE, session, 0, card, None)
            await here.answer(here.service.sampling.submit(ALICE, sampler.id, 0, b"{}"))
            driver, worker = here.service.drivers["tiny"], here.service.sampling.workers["tiny"]

            async def later(seconds: float) -> None:
                now[0] += seconds
                await here.service.sweep(now[0])
                await asyncio.sleep(0)

            await later(25)
            here.service.sessions.heartbeat(ALICE, session)
            await later(25)
            assert (driver.status, worker.status) == ("ready", "ready")
            here.engines.sampler.gate.clear()
            drawn = here.service.sampling.submit(ALICE, sampler.id, 1, b"{}")
            await later(31)
            await until(lambda: driver.status == "idle")
            assert worker.status == "ready", "it draws"
            assert not here.engines.trainer.alive
            here.engines.sampler.gate.set()
            await here.answer(drawn)
            await later(31)
            assert worker.status == "idle"
            await here.service.finish_session(ALICE, session, "", None)
            await asyncio.sleep(0)
            assert driver.status == "idle", "to let something go, no worker is started"
            again = await here.connect(ALICE)
            await here.train(again, 1)
            assert (driver.status, here.engines.trainer.starts) == ("ready", 2)
            other = await here.service.sampling.open(ALICE, again.split(":")[0], 0, card, None)
            await here.answer(here.service.sampling.submit(ALICE, other.id, 0, b"{}"))
            assert (worker.status, here.engines.sampler.starts) == ("ready", 2)

    scenario(body)


def test_a_run_past_its_lifetime_is_saved_and_closed_and_says_where_it_is(tmp_path: Path) -> None:
    """S2-46: also while it is in use; its owner is warned before, and the server's own runs go on."""
    limits = Limits(max_lifetime=100.0, owner="owner")

    async def body() -> None:
        now = [1e9]
        journal = MemoryJournal(lambda: now[0])
        async with world(tmp_path, journal=journal, limits=limits) as here:
            here.service.ledger.clock = lambda: now[0]
            run, own = await here.connect(ALICE), await here.connect(OWNER)
            await here.train(run, 2)
            assert here.service.lifetimes.ending("alice", now[0]) == []
            now[0] += 95
            (warned,) = here.service.lifetimes.ending("alice", now[0])
            assert warned["run"] == run
            assert 0 < float(warned["seconds_left"]) <= 6
            await here.service.sweep(now[0])
            await here.train(run, 1)
            now[0] += 10
            last = f"tinker://{run}/weights/lifetime"
            with pytest.raises(UserError, match=last):
                await here.forward_backward(run)
            for _ in range(3):
                await here.service.sweep(now[0])
                await until(lambda: not here.service.state.runs[run].pending)
            assert here.service.state.runs[run].status == "closed"
            assert here.service.state.checkpoints[last].step == 3
            await here.forward_backward(own, who=OWNER)
            session = await here.service.sessions.open(ALICE, {"tags": []})
            again = await here.service.runs.load_new_model(ALICE, session, 0, last, True, {}, b"load")
            assert not (await here.answer(again)).category

    scenario(body)


def test_checkpoints_have_their_share_of_the_disk(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(checkpoint_bytes=2))) as here:
            run = await here.connect(ALICE)
            kind = CheckpointKind.TRAINING
            for n in range(2):
                saved = await here.service.runs.save_weights(ALICE, run, 50 + n, f"c{n}", kind, b"%d" % n)
                await here.answer(saved)
            before = len(here.service.state.checkpoints)
            with pytest.raises(UserError, match="2 of 2 bytes"):
                await here.service.runs.save_weights(ALICE, run, 60, "c9", kind, b"9")
            assert len(here.service.state.checkpoints) == before
            await here.service.checkpoints.delete(ALICE, f"tinker://{run}/weights/c0")
            await here.answer(await here.service.runs.save_weights(ALICE, run, 61, "c9", kind, b"9"))

    scenario(body)


def test_saves_that_wait_count_as_if_they_were_done(tmp_path: Path) -> None:
    """T12: of many checkpoints asked for at once only as many are accepted as there is room for; asked again, the same
    request is the same answer, though its own bytes have filled the room by then.
    """

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(checkpoint_bytes=3))) as here:
            run, kind = await here.connect(ALICE), CheckpointKind.TRAINING
            saves = here.service.runs.save_weights
            here.engines.trainer.gate.clear()
            first = await saves(ALICE, run, 50, "c0", kind, b"0")
            with pytest.raises(Overloaded, match="still being saved"):  # nobody knows yet what one takes
                await saves(ALICE, run, 51, "c1", kind, b"1")
            assert await saves(ALICE, run, 50, "c0", kind, b"0") == first
            here.engines.trainer.gate.set()
            await here.answer(first)
            here.engines.trainer.gate.clear()
            accepted = [await saves(ALICE, run, 51 + n, f"c{1 + n}", kind, b"%d" % n) for n in range(2)]
            for _ in range(3):
                with pytest.raises(UserError, match="3 of 3 bytes"):
                    await saves(ALICE, run, 60, "c9", kind, b"9")
            assert await saves(ALICE, run, 52, "c2", kind, b"1", overwrite=False) == accepted[1]
            here.engines.trainer.gate.set()
            for request in accepted:
                await here.answer(request)
            assert await saves(ALICE, run, 52, "c2", kind, b"1", overwrite=False) == accepted[1]
            assert len(here.service.state.checkpoints) == 3

    scenario(body)


def test_copies_at_once_share_the_room_that_is_left(tmp_path: Path) -> None:
    """T12: ten copies race for two places."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(checkpoint_bytes=3))) as here:
            run = await here.connect(ALICE)
            saved = await here.service.runs.save_weights(ALICE, run, 50, "c0", CheckpointKind.TRAINING, b"0")
            await here.answer(saved)
            (source,) = here.service.state.checkpoints.values()
            os.makedirs(source.directory, exist_ok=True)  # noqa: PTH103
            session = here.service.sessions.mine(ALICE)[0]
            copies = [
                here.service.checkpoints.copy(source, session, f"{session.id}:train:{n}", None)
                for n in range(1, 11)
            ]
            ended = await asyncio.gather(*copies, return_exceptions=True)
            refused = [each for each in ended if isinstance(each, BaseException)]
            assert len(refused) == 8
            assert all("storage is full" in str(each) for each in refused)
            assert len(here.service.state.checkpoints) == 3

    scenario(body)


def test_what_was_deleted_and_is_still_sampled_from_counts(tmp_path: Path) -> None:
    """T12: saving, sampling, deleting, over and over, fills no disk; once the client is gone, the files are too."""

    async def body() -> None:
        async with world(tmp_path, quotas=Quotas(Quota(checkpoint_bytes=2))) as here:
            run, service = await here.connect(ALICE), here.service
            sampling, card = await service.sessions.open(ALICE, {"tags": []}), service.catalog.resolve("tiny")

            async def save_sample_delete(n: int) -> Path:
                saved = await service.runs.save_weights(
                    ALICE, run, 50 + n, "c", CheckpointKind.TRAINING, b"%d" % n
                )
                await here.answer(saved)
                (made,) = service.state.checkpoints.values()
                files = Path(made.directory)
                os.truncate(
                    files / "run.json", made.size_bytes
                )  # what the scripted engine says that it takes
                await service.sampling.open(ALICE, sampling, n, card, made)
                await service.checkpoints.delete(ALICE, made.path)
                return files

            kept = [await save_sample_delete(n) for n in range(2)]
            assert all(files.is_dir() for files in kept)
            with pytest.raises(UserError, match=r"2 of 2 bytes .* while a connected client samples"):
                await save_sample_delete(2)
            service.sessions._seen[sampling] -= 2 * service.limits.idle_timeout  # its kernel is gone
            await service.sweep(service.ledger.clock())
            assert not any(files.exists() for files in kept)
            await save_sample_delete(2)

    scenario(body)


def test_what_waits_is_bounded_in_number_and_in_bytes_and_others_have_room(tmp_path: Path) -> None:
    """H4, L6, T12: over all runs of a tenant; "later" (429), never an error; one alone always fits."""
    limits = Limits(queued_ops_per_tenant=4, queued_bytes_per_tenant=100)

    async def body() -> None:
        async with world(tmp_path, limits=limits) as here:
            runs = [await here.connect(ALICE, n) for n in range(2)]
            other = await here.connect(BOB)
            here.engines.trainer.gate.clear()
            accepted = [await here.forward_backward(runs[0], text="x" * 198 + ":8")]
            with pytest.raises(Overloaded, match="200 bytes"):
                await here.forward_backward(runs[1], text="y:8")
            accepted += [await here.optim_step(run) for run in (runs[0], runs[1], runs[1])]
            with pytest.raises(Overloaded, match="4 requests of yours"):
                await here.optim_step(runs[1])
            theirs = await here.forward_backward(other, who=BOB, text="z" * 97 + ":8")
            here.engines.trainer.gate.set()
            for request in accepted:
                assert not (await here.answer(request)).category
            assert not (await here.answer(theirs, BOB)).category
            assert not (await here.answer(await here.forward_backward(runs[1], text="y:8"))).category

    scenario(body)
