"""Idle cullers: what counts as activity of a notebook server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_server import Server
from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter_server import app
from tuft_jupyter_server.app import count_as_activity
from tuft_jupyter_server.host import Host


def test_training_counts_as_activity_and_looking_does_not(tmp_path: Path) -> None:
    """F19: a culler leaves a server alone while something is recorded, and only then."""

    async def scenario() -> None:
        host = Host(load_settings(None, {"TUFT_HOME": str(tmp_path)}), engines=ScriptedEngines())
        await host.start()
        times: dict[str, Any] = {}
        counting = asyncio.ensure_future(count_as_activity(host, {"last_activity_times": times}))
        await asyncio.sleep(0)
        host.status(host.owner)
        await asyncio.sleep(0)
        assert not times
        began = datetime.now(UTC)
        await host.service.sessions.open(host.owner, {})
        await asyncio.sleep(0)
        assert times["tuft_jupyter"] >= began
        counting.cancel()
        await host.stop()

    asyncio.run(scenario())


def test_an_op_that_takes_long_counts_as_activity_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F19: not culled while a lane has work, culled when none has."""
    monkeypatch.setattr(app, "ACTIVITY_SECONDS", 0.01)

    async def scenario() -> None:
        server = Server(tmp_path)
        await server.host.start()
        run = await server.new_run()
        server.host.engines.trainer.gate.clear()
        step = await server.post("/optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}})
        times: dict[str, Any] = {}
        counting = asyncio.ensure_future(count_as_activity(server.host, {"last_activity_times": times}))
        for _ in range(2):  # nothing is recorded meanwhile
            times.clear()
            async with asyncio.timeout(5):
                while not times:  # noqa: ASYNC110 - a plain dict
                    await asyncio.sleep(0.001)
        server.host.engines.trainer.gate.set()
        await server.post("/retrieve_future", step)
        await asyncio.sleep(0.05)
        times.clear()
        await asyncio.sleep(0.05)
        assert not times
        counting.cancel()
        server.http.stop()
        await server.host.stop()

    asyncio.run(scenario())


def test_a_stop_finishes_the_step_under_way_and_leaves_the_rest_to_the_next_server(tmp_path: Path) -> None:
    """F19: SIGTERM while twenty ops wait: done within ten seconds, nothing lost, nothing done twice."""

    async def scenario() -> None:
        first = Server(tmp_path)
        await first.host.start()
        run = await first.new_run()
        trainer = first.host.engines.trainer
        trainer.gate.clear()
        steps = [
            await first.post("/optim_step", {"model_id": run, "seq_id": i, "adam_params": {}})
            for i in range(1, 21)
        ]
        while not trainer.calls[-1:] or len(trainer.calls) < 2:  # noqa: ASYNC110 - until a step is under way
            await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        stopping = asyncio.ensure_future(first.host.stop())
        await asyncio.sleep(0)
        trainer.gate.set()
        await stopping
        assert asyncio.get_running_loop().time() - began < 10
        done = first.host.ledger.state.runs[run].step
        assert 1 <= done < 20
        first.http.stop()

        second = Server(tmp_path)
        await second.host.start()
        for step in steps:
            assert "error" not in await second.post("/retrieve_future", step)
        assert second.host.ledger.state.runs[run].step == 20
        assert second.host.engines.trainer.runs[run] == ["step"] * 20
        second.http.stop()
        await second.host.stop()

    asyncio.run(scenario())
