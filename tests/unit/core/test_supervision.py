"""What the driver does about workers that die, die again, or hang; against a scripted engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.scripted_engine import ScriptedEngine, ScriptedEngines
from tests.support.world import ALICE, BOB, scenario, stepped, until, world
from tuft_jupyter.core.engine import EngineDied, Task
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.types import OpKind, Record
from tuft_jupyter.core.watchdog import Timeouts, Watchdog

STEP = [Task("r", "run", OpKind.OPTIM_STEP, grant=16)]


def test_a_worker_that_dies_while_it_rebuilds_is_not_held_against_the_op_that_waits(tmp_path: Path) -> None:
    """F3: killed during the op once and during the recovery twice, the run is what it would have been."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 4)
            last = await w.forward_backward(run)
            deaths = iter([last, "restore", passes[-1]])
            doomed = next(deaths)

            def dies(task: Task) -> bool:
                nonlocal doomed
                if task.request_id == doomed:
                    doomed = next(deaths, "")
                    return True
                return False

            w.engines.trainer.dies_on = dies
            assert not (await w.answer(last)).category
            assert w.engines.trainer.starts == 4
            assert w.trained == [*stepped(passes), last]

    scenario(body)


def test_a_run_that_kills_every_worker_that_rebuilds_it_fails_alone_and_may_try_again(tmp_path: Path) -> None:
    """F9: three workers in a row died of it, then what waits is failed with the reason; other runs go on."""

    async def body() -> None:
        async with world(tmp_path) as w:
            sick, healthy = await w.connect(), await w.connect(BOB)
            passes = await w.train(sick, 1)
            w.engines.trainer.kill()
            w.engines.trainer.dies_on = lambda task: task.request_id == passes[0]
            waiting = [await w.forward_backward(sick), await w.optim_step(sick)]
            bobs = await w.forward_backward(healthy, who=BOB)
            for request_id in waiting:
                answer = await w.answer(request_id)
                assert (answer.category, "3 workers in a row died" in answer.error) == ("server", True)
            assert not (await w.answer(bobs, BOB)).category

            w.engines.trainer.dies_on = lambda task: False
            again = await w.forward_backward(sick)
            assert not (await w.answer(again)).category
            assert w.engines.trainer.runs[sick] == [*stepped(passes), again]

    scenario(body)


def test_a_step_that_waits_behind_the_batch_that_kills_is_not_suspected(tmp_path: Path) -> None:
    """F11: an optimizer step sent along with the pass before it has not begun when that pass kills the worker."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 1)
            w.engines.trainer.gate.clear()
            fatal = await w.forward_backward(run)
            step = await w.optim_step(run)
            await until(lambda: len(w.engines.trainer.calls) == 5)  # create, pass, step, then these two
            (lane,) = w.service.drivers["tiny"].lanes.by_run.values()
            w.engines.trainer.dies_on = lambda task: task.request_id == fatal
            entries = list(lane.queue)
            w.engines.trainer.gate.set()
            assert (await w.answer(fatal)).category == "server"
            assert not (await w.answer(step)).category
            assert [entry.attempts for entry in entries] == [2, 0]

    scenario(body)


def test_a_journal_that_is_silent_while_a_run_is_rebuilt_fails_nothing(tmp_path: Path) -> None:
    """F7, P1: the worker died, and Redis does not answer just now: the run is brought back when it does."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 2)
            journal = w.service.ledger.journal
            read, silent = journal.read, iter([True, True])

            async def sometimes(n: int) -> Record | None:
                if next(silent, False):
                    raise Overloaded("Redis does not answer", retry_after=0.01)
                return await read(n)

            journal.read = sometimes  # type: ignore[method-assign]
            w.engines.trainer.kill()
            last = await w.forward_backward(run)
            assert not (await w.answer(last)).category
            assert w.trained == [*stepped(passes), last]
            assert next(silent, None) is None

    scenario(body)


def test_what_waits_behind_an_unload_is_told_so_and_nothing_of_the_run_stays(tmp_path: Path) -> None:
    """L7: its lane, its numbers and its snapshots go; its record and its checkpoints stay."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 4)
            assert list((tmp_path / "snapshots").glob("*/*"))
            w.engines.trainer.gate.clear()
            closing = await w.service.runs.unload(ALICE, run, b"unload")
            late = await w.forward_backward(run)
            w.engines.trainer.gate.set()
            assert not (await w.answer(closing)).category
            answer = await w.answer(late)
            assert (answer.category, "was unloaded" in answer.error) == ("user", True)
            await w.service.sweep(0.0)
            assert w.service.drivers["tiny"].lanes.by_run == {}
            assert list((tmp_path / "snapshots").iterdir()) == []
            assert w.service.ledger.seen.next_seq(run) == 1
            assert w.service.state.runs[run].status == "closed"

    scenario(body)


def test_a_run_that_was_left_alone_comes_back_with_its_next_request(tmp_path: Path) -> None:
    """L7: nothing of it is in memory meanwhile but what the journal tells."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 2)
            driver = w.service.drivers["tiny"]
            driver.release(run)
            await until(lambda: not driver.lanes.by_run[run].resident)
            await w.service.sweep(0.0)
            assert run not in driver.lanes.by_run
            passes += await w.train(run, 1)
            assert w.trained == stepped(passes)

    scenario(body)


def test_a_hung_worker_is_ended_and_the_op_runs_in_a_new_one(tmp_path: Path) -> None:
    """F10: nobody waits for ever; the other runs are not touched."""

    async def body() -> None:
        engines = ScriptedEngines()
        async with world(tmp_path, engines=engines) as w:
            alices, bobs = await w.connect(ALICE), await w.connect(BOB)
            passes = await w.train(alices, 2)
            driver = w.service.drivers["tiny"]
            assert isinstance(driver.engine, Watchdog)
            driver.engine.timeouts = Timeouts(least=0.05, factor=1.0)
            engines.trainer.hangs = True
            stuck = await w.forward_backward(alices)
            other = await w.forward_backward(bobs, who=BOB)
            await until(lambda: not engines.trainer.alive)
            engines.trainer.hangs = False
            assert not (await w.answer(stuck)).category
            assert not (await w.answer(other, BOB)).category
            assert engines.trainer.runs[alices] == [*stepped(passes), stuck]

    scenario(body)


def test_a_model_that_never_finishes_loading_is_said_so() -> None:
    class Stuck(ScriptedEngine):
        async def start(self) -> None:
            await asyncio.Event().wait()

    with pytest.raises(ServerError, match=r"not loaded within 0\.01 s"):
        asyncio.run(Watchdog(Stuck(), 64, Timeouts(start=0.01)).start())


def test_time_is_given_by_what_steps_took_so_far() -> None:
    """F10: a slow model gets a longer timeout than a fast one, and files get the most."""
    now = 0.0

    class Slow(ScriptedEngine):
        async def step(self, tasks: object) -> list[object]:  # type: ignore[override]
            nonlocal now
            now += 32.0
            return []

    async def body() -> None:
        dog = Watchdog(Slow(), longest=64, clock=lambda: now)
        assert dog._allowed(STEP) == dog.timeouts.unknown
        await dog.step(STEP)
        assert dog._allowed(STEP) == 10 * 64 * 2.0
        assert dog._allowed([Task("s", "run", OpKind.SAVE_WEIGHTS)]) == dog.timeouts.unknown

    asyncio.run(body())


def test_a_call_behind_another_has_that_ones_time_too() -> None:
    async def body() -> None:
        engine = ScriptedEngine()
        engine.hangs = True
        dog = Watchdog(engine, 64, Timeouts(unknown=0.02))
        clock = asyncio.get_running_loop().time
        began = clock()
        first, second = asyncio.ensure_future(dog.step(STEP)), asyncio.ensure_future(dog.step(STEP))
        with pytest.raises(EngineDied):
            await first
        with pytest.raises(EngineDied):
            await second
        assert clock() - began >= 0.04

    asyncio.run(body())
