"""A recovery that is disturbed: the journal is told once, and what was accepted is run, once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_journals import journal
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import ScriptedEngines
from tests.support.world import SnapshotRule, World, scenario, world
from tuft_jupyter.core import journal_redis
from tuft_jupyter.core.journal import Unavailable
from tuft_jupyter.core.types import Record


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
