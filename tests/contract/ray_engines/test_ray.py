"""The Ray under the actors: one for all, on loopback only, with a token of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support import actors
from tests.support.actor_tasks import CANARY
from tests.support.live import quickest
from tests.support.loops import at_best
from tuft_jupyter.config import Settings
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine import ray_place
from tuft_jupyter.engine.ray_engines import RayEngines, RayTrainingEngine

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_only_loopback_listens_and_secrets_are_ours_alone(
    training: RayTrainingEngine, settings: Settings, runner: asyncio.Runner
) -> None:
    """M6, P5, S3-23, S3-31, S3-32: no port is open, the token is ours, kernels and workers get no secrets of others."""
    training.actor_class = actors.FaultyTrainingActor
    runner.run(training.start())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening: set[str] = set()
    commands: list[str] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # some come and go
            commands += process.cmdline()
            connections = process.net_connections("inet")
            listening |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= LOOPBACK

    own = {process.name(): process for process in psutil.Process().children()}
    assert {"gcs_server", "raylet"} <= own.keys()
    environment = own["raylet"].environ()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.is_relative_to(settings.home)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() not in " ".join(commands)
    temp = ray_place.temp_dir()
    assert temp.name == f"ray_{os.getuid()}"
    assert stat.S_IMODE(temp.stat().st_mode) == 0o700
    assert not [name for name in os.environ if name.startswith("RAY_AUTH") or name == "RAY_ADDRESS"]

    import ray

    assert ray.get_runtime_context().namespace == "tuft_cluster"
    shown = training.resources()
    assert shown["pid"] in {process.pid for process in processes}
    assert shown["rss_bytes"] > 1 << 20
    assert (shown["device"], shown["threads"]) == ("cpu", 1)
    assert CANARY not in psutil.Process(training.pid).environ().values()


def test_many_starts_at_once_are_one_ray_and_the_loop_stays_free(
    engines: RayEngines, runner: asyncio.Runner
) -> None:
    """S3-21: a second session would say so, and nothing here blocks the event loop."""

    async def lag() -> float:
        sessions, worst = await asyncio.gather(
            asyncio.gather(*(engines._runtime.acquire(i) for i in range(10))), _worst_lag(20)
        )
        assert len(set(map(id, sessions))) == 1
        for i in range(10):
            await engines._runtime.release(i)
        return worst

    assert runner.run(at_best(lag, 0.25, tries=5)) < 0.25


async def _worst_lag(ticks: int) -> float:
    worst = 0.0
    for _ in range(ticks):
        asked = time.perf_counter()
        await asyncio.sleep(0.005)
        worst = max(worst, time.perf_counter() - asked - 0.005)
    return worst


def test_a_named_cluster_that_is_not_there_is_an_error_within_seconds(
    settings: Settings, card: ModelCard
) -> None:
    """S3-24, fact 6: Ray itself would wait for minutes."""
    engine = RayEngines(replace(settings, ray_address="127.0.0.1:1")).training(card)

    def refused() -> None:
        with pytest.raises(ServerError, match=r"127\.0\.0\.1:1.*cannot be reached"):
            asyncio.run(engine.start())

    _, seconds = quickest(refused, 5)
    assert seconds < 5
