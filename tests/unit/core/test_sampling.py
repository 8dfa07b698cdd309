"""Sample requests under way: how many a tenant may have, what they wait for, and that cancelling ends them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tests.support.logs import messages
from tests.support.scripted_engine import ScriptedEngines, ScriptedSampler
from tests.support.world import ALICE, BOB, World, scenario, until, world
from tuft_jupyter.core import sampling
from tuft_jupyter.core.errors import Lost, Overloaded, ServerError
from tuft_jupyter.core.types import Principal


async def opened(w: World, who: Principal) -> str:
    session = await w.service.sessions.open(who, {"tags": []})
    sampler = await w.service.sampling.open(who, session, 0, w.service.catalog.resolve("tiny"), None)
    w.engines.sampler.gate.clear()
    return sampler.id


def test_a_tenant_at_its_limit_is_told_to_come_back_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6: 429 with Retry-After, which the SDK follows; a repeated request is known and needs no room."""

    async def body() -> None:
        monkeypatch.setattr(sampling, "WAITING", 3)
        async with world(tmp_path) as w:
            mine, theirs = await opened(w, ALICE), await opened(w, BOB)
            submit = w.service.sampling.submit
            requests = [submit(ALICE, mine, seq, b"{}") for seq in range(3)]
            with pytest.raises(Overloaded, match="3 sample requests of yours"):
                submit(ALICE, mine, 3, b"{}")
            assert submit(ALICE, mine, 2, b"{}") == requests[2]
            others = submit(BOB, theirs, 0, b"{}")
            w.engines.sampler.gate.set()
            for request in requests:
                assert (await w.answer(request)).body == b"base"
            assert (await w.answer(others, BOB)).body == b"base"
            await w.answer(submit(ALICE, mine, 3, b"{}"))

    scenario(body)


def test_bodies_under_way_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr(sampling, "WAITING_BYTES", 100)
        async with world(tmp_path) as w:
            sampler = await opened(w, ALICE)
            first = w.service.sampling.submit(ALICE, sampler, 0, b" " * 90)
            with pytest.raises(Overloaded):
                w.service.sampling.submit(ALICE, sampler, 1, b" " * 20)
            w.engines.sampler.gate.set()
            await w.answer(first)
            await w.answer(w.service.sampling.submit(ALICE, sampler, 1, b" " * 20))

    scenario(body)


def test_a_cancelled_sample_fails_at_once_leaves_room_and_is_told_to_pollers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        monkeypatch.setattr(sampling, "WAITING", 1)
        async with world(tmp_path) as w:
            sampler = await opened(w, ALICE)
            request = w.service.sampling.submit(ALICE, sampler, 0, b"{}")
            with pytest.raises(Lost):
                await w.service.sampling.cancel(BOB, request)
            await w.service.sampling.cancel(ALICE, request)
            answer = await w.answer(request)
            assert (answer.category, answer.error) == ("user", sampling.CANCELLED)
            ended, _ = await w.service.sampling.completions.after(sampler, 0, 0, 0.0)
            assert [(one.request_id, one.size_bytes) for one in ended] == [(request, None)]
            w.engines.sampler.gate.set()
            following = w.service.sampling.submit(ALICE, sampler, 1, b"{}")
            assert (await w.answer(following)).body == b"base"
            await w.service.sampling.cancel(ALICE, following)  # too late: its answer stays
            assert (await w.answer(following)).body == b"base"
            assert (await w.answer(request)).category == "user"

    scenario(body)


def test_who_waits_is_told_for_what_and_with_whom(tmp_path: Path) -> None:
    """X11: the reason in words, with numbers."""

    async def body() -> None:
        async with world(tmp_path) as w:
            mine, theirs = await opened(w, ALICE), await opened(w, BOB)
            worker = w.service.sampling.worker(w.service.catalog.resolve("tiny"))
            await until(lambda: worker.status == "ready")
            request = w.service.sampling.submit(ALICE, mine, 0, b"{}")
            for seq in range(2):
                w.service.sampling.submit(BOB, theirs, seq, b"{}")
            reason = await w.service.queue_reason(ALICE, request)
            assert reason == "drawing tokens: 1 requests of yours among 3 share tiny"
            w.engines.sampler.held_up = "4000 of the 4096 tokens that the KV cache holds are taken"
            reason = await w.service.queue_reason(ALICE, request)
            assert reason == f"waiting to be drawn: {w.engines.sampler.held_up}"
            w.engines.sampler.gate.set()
            await w.answer(request)

    scenario(body)


class SlowSampler(ScriptedSampler):
    """Loads for ever; the end of its process is the failure of its start."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = 0
        self.ended = asyncio.Event()

    async def start(self) -> None:
        self.starts += 1
        await self.ended.wait()
        raise ServerError("the sampling worker died while loading tiny")

    async def stop(self) -> None:
        self.ended.set()


def test_a_stop_while_a_sampler_loads_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        engines = ScriptedEngines()
        engines.sampler = slow = SlowSampler()
        async with world(tmp_path, engines=engines) as w:
            await opened(w, ALICE)
            await until(lambda: slow.starts == 1)
        await asyncio.sleep(0)
        assert not messages(caplog, logging.WARNING)

    scenario(body)
