"""Workers that die or hang, and Ray's own processes: whoever waits hears of it, and a new one goes on."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from tests.support import actors
from tests.support.actor_tasks import (
    create,
    forward_backward,
    good,
    runs,
    sample_body,
)
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import standby
from tuft_jupyter.engine.ray_engines import RaySamplingEngine, RayTrainingEngine
from tuft_jupyter.engine.ray_local import log_tail

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_worker_that_dies_while_loading_leaves_its_last_words(
    training: RayTrainingEngine, runner: asyncio.Runner
) -> None:
    training.actor_class = actors.DyingTrainingActor
    with pytest.raises(ServerError, match=r"died while loading tiny.*Allocation of 1 PB failed"):
        runner.run(training.start())


def test_a_worker_that_is_killed_is_replaced_by_the_one_that_stands_by(
    training: RayTrainingEngine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: and the next one stands by; an engine that is stopped leaves neither."""
    training.actor_class = actors.FaultyTrainingActor
    training.standby = True
    monkeypatch.setattr(standby, "DELAY_SECONDS", 0.0)

    async def spare() -> int:
        async with asyncio.timeout(60):
            while training.standby_pid is None:  # noqa: ASYNC110 - another process is waited for
                await asyncio.sleep(0.01)
        return training.standby_pid

    async def body() -> None:
        await training.start()
        for _ in range(2):
            waiting, working = await spare(), training.pid
            assert working is not None
            os.kill(working, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await training.step([create()])
            await training.start()
            assert training.pid == waiting
            (made,) = await training.step([create()])
            assert not made.category
        last = [psutil.Process(await spare()), psutil.Process(training.pid)]
        await training.stop()
        assert not [process for process in last if runs(process)]

    runner.run(body())


def test_a_hung_step_ends_with_the_engine(training: RayTrainingEngine, runner: asyncio.Runner) -> None:
    """F10: stopping a worker that hangs takes its process away and tells whoever waits."""
    training.actor_class = actors.FaultyTrainingActor

    async def scenario() -> None:
        await training.start()
        good((await training.step([create()]))[0])
        process = psutil.Process(training.pid)
        hanging = asyncio.create_task(training.step([forward_backward(actors.HANG)]))
        await asyncio.sleep(0)
        await training.stop()
        with pytest.raises(EngineDied):
            await hanging
        assert not runs(process)

        await training.start()
        await training.step([create()])
        with pytest.raises(EngineDied):
            await training.step([forward_backward(actors.KILL)])

    runner.run(scenario())


def test_a_broken_sampler_ends_its_process(sampling: RaySamplingEngine, runner: asyncio.Runner) -> None:
    """F9: the failed request hears of it, and the process does not live on as a corpse."""
    sampling.actor_class = actors.FaultySamplingActor

    async def scenario() -> None:
        await sampling.start()
        process = psutil.Process(sampling.pid)
        outcome = await sampling.sample("r", None, sample_body(actors.BREAK))
        assert outcome.category == "server"
        await asyncio.to_thread(process.wait, 30)
        with pytest.raises(EngineDied):
            await sampling.sample("s", None, sample_body(1))

    runner.run(scenario())


def test_a_sampler_that_hangs_ends_its_process_and_says_where(
    sampling: RaySamplingEngine, runner: asyncio.Runner
) -> None:
    """F10: whoever waits hears of a death, which a new worker mends."""
    sampling.actor_class = actors.FaultySamplingActor

    async def scenario() -> None:
        await sampling.start()
        actor = sampling._actor
        assert actor is not None
        with pytest.raises(EngineDied):
            await sampling.sample("r", None, sample_body(actors.HANG))
        said = "".join(log_tail(actor.session.logs, actor.pid, 200))
        assert "Timeout" in said
        assert "fake_engine.py" in said
        await sampling.start()
        good(await sampling.sample("s", None, sample_body(1)))

    runner.run(scenario())


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_the_death_of_ray_itself_is_noticed_and_survived(
    victim: str, training: RayTrainingEngine, runner: asyncio.Runner
) -> None:
    """Ray would end this whole process a minute after its GCS; it goes on, with a new Ray."""
    training.actor_class = actors.FaultyTrainingActor

    async def scenario() -> None:
        await training.start()
        await training.step([create()])
        hanging = asyncio.create_task(training.step([forward_backward(actors.HANG)]))
        await asyncio.sleep(0)
        next(p for p in psutil.Process().children() if p.name() == victim).kill()
        with pytest.raises(EngineDied):
            await asyncio.wait_for(hanging, 30)  # half of the time that Ray takes to end us
        await training.start()
        good((await training.step([create()]))[0])

    runner.run(scenario())
