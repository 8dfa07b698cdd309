"""Clocks that jump: what has a time to live counts from its own beginning."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.support.world import ALICE, World, scenario, world
from tuft_jupyter.core.ledger import steady_clock
from tuft_jupyter.core.quotas import Limits
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.types import CheckpointKind


@pytest.mark.parametrize("jump", [86400.0, -86400.0])
def test_setting_the_machines_clock_ends_nothing_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """F18: a day forward or back, while a server runs: no checkpoint, result or session expires."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            (left,) = [await w.forward_backward(run)]
            w.seq += 1
            training = CheckpointKind.TRAINING
            asked = await w.service.runs.save_weights(ALICE, run, w.seq, "a", training, b"save", ttl=3600.0)
            await w.answer(asked)
            wall = time.time
            monkeypatch.setattr(time, "time", lambda: wall() + jump)
            await w.service.sweep(w.service.ledger.clock())
            assert w.service.state.checkpoints
            assert (await w.answer(left)).body == b"done"
            waiting = await w.optim_step(run)
            assert not (await w.answer(waiting)).category
            assert run in w.engines.trainer.runs
            monkeypatch.undo()

    scenario(body)


def test_the_steady_clock_begins_with_the_machines_and_only_goes_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F18."""
    clock = steady_clock()
    assert abs(clock() - time.time()) < 1.0
    before = clock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock() - before < 60.0


def test_a_server_that_was_stopped_for_hours_holds_no_clients_silence_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F18: a paused container hears no heartbeat; weights that somebody samples from are still there afterwards."""

    async def body() -> None:
        monkeypatch.setattr(Service, "_tick", lambda self: 0.01)
        async with world(tmp_path, limits=Limits(idle_timeout=1800.0)) as w:
            weights = await ephemeral(w)
            sweeps: list[float] = []
            sweep, clock = w.service.sweep, w.service.ledger.clock

            async def counted(now: float) -> None:
                await sweep(now)
                sweeps.append(now)

            w.service.sweep = counted  # type: ignore[method-assign]
            w.service.ledger.clock = lambda: clock() + 7200.0
            awake = clock() + 7200.0
            async with asyncio.timeout(10):
                while not sweeps or sweeps[-1] < awake:  # noqa: ASYNC110 - a plain list
                    await asyncio.sleep(0.01)
            assert weights.is_dir()

    scenario(body)


def test_a_server_whose_journal_was_taken_over_removes_no_files(tmp_path: Path) -> None:
    """F8: clients are heard of by the other one now."""

    async def body() -> None:
        async with world(tmp_path) as w:
            weights = await ephemeral(w)
            w.service.ledger.journal.problem = "another server took over"
            await w.service.sweep(w.service.ledger.clock() + 7200.0)
            assert weights.is_dir()
            w.service.ledger.journal.problem = ""
            await w.service.sweep(w.service.ledger.clock() + 7200.0)
            assert not weights.exists()

    scenario(body)


async def ephemeral(w: World) -> Path:
    """The directory of weights that were saved for one sampler."""
    run = await w.connect()
    saved = await w.service.runs.save_for_sampling_session(ALICE, run, 1, 0, b"save")
    assert not (await w.answer(saved)).category
    (sampler,) = w.service.state.samplers.values()
    return Path(sampler.directory or "")


def test_a_panel_that_never_reads_costs_a_bounded_queue_and_is_told_to_start_anew(tmp_path: Path) -> None:
    """L5: its queue is dropped when it is full; who reads misses nothing meanwhile."""

    async def body() -> None:
        async with world(tmp_path) as w:
            feed = w.service.ledger.feed
            stuck, reader = feed.subscribe(None), feed.subscribe(None)
            heard = 0
            for i in range(3000):
                await w.service.ledger.record("model_offered", "alice", {"name": f"m{i}", "path": "p"})
                heard += len(reader.drain())
            assert stuck.overflowed
            assert len(stuck._records) <= 1024
            assert (heard, reader.overflowed) == (3000, False)

    scenario(body)


def test_waits_are_bounded_whatever_the_time_of_day(tmp_path: Path) -> None:
    """F18: a poll that is parked while the clock is set ends when it was to end."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            waiting = await w.forward_backward(run)
            async with asyncio.timeout(5):
                assert await w.service.retrieve(ALICE, waiting, 0.01) is None
            w.engines.trainer.gate.set()

    scenario(body)
