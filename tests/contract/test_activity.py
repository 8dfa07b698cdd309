"""Idle cullers: what counts as activity of a notebook server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
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
