"""A server that is being started: nothing seems to be gone, nobody waits without an end, and one server writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.contract.test_http import Server
from tuft_jupyter.core.journal import Sink
from tuft_jupyter_server import host as hosts


def scenario(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


async def stop(server: Server) -> None:
    server.http.stop()
    await server.host.stop()


def test_while_the_journal_is_read_requests_wait_and_nothing_seems_to_be_gone(tmp_path: Path) -> None:
    """F2, S1-48: a client that is quicker than the recovery is not told that its model does not exist."""

    async def body() -> None:
        first = Server(tmp_path)
        await first.host.start()
        run = await first.new_run()
        await stop(first)

        second = Server(tmp_path)
        read, reading = second.host.journal.open, asyncio.Event()

        async def slow(sink: Sink) -> None:
            await reading.wait()
            await read(sink)

        second.host.journal.open = slow  # type: ignore[method-assign]
        starting = asyncio.ensure_future(second.host.start())
        asked = asyncio.ensure_future(second.ask("POST", "/get_info", {"model_id": run}))
        assert (await second.ask("GET", "/healthz")).code == 200
        status = json.loads((await second.ask("GET", "/tuft/status")).body)
        assert (status["ready"], status["waiting_for"]) == (False, "reading the journal")
        assert not asked.done()
        second.host.api.hold_seconds = 0.05
        late = await second.ask("POST", "/get_info", {"model_id": run})
        assert (late.code, "reading the journal" in late.body.decode()) == (429, True)
        reading.set()
        assert (await asked).code == 200
        await starting
        await stop(second)

    scenario(body)


def test_a_second_server_names_the_first_and_takes_over_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8, S1-52: on one SQLite file; what the first made is there."""
    monkeypatch.setattr(hosts, "TAKE_OVER_SECONDS", 0.02)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        first, second = Server(tmp_path), Server(tmp_path)
        await first.host.start()
        run = await first.new_run()
        began = loop.time()
        await second.host.start()
        refused = await second.ask("POST", "/get_info", {"model_id": run})
        assert loop.time() - began < 2
        assert refused.code == 429
        assert "in use by process" in refused.body.decode()
        status = json.loads((await second.ask("GET", "/tuft/status")).body)
        assert "in use by process" in status["waiting_for"]
        await stop(first)
        await second.host._ready.wait()
        assert (await second.ask("POST", "/get_info", {"model_id": run})).code == 200
        await stop(second)

    scenario(body)


@pytest.mark.parametrize("retried", [False, True])
def test_a_client_that_polls_across_a_restart_gets_its_answers(tmp_path: Path, retried: bool) -> None:
    """S1-49: queued ops are not failed, as TuFT does: they are run, and each poll gets an answer."""

    async def body() -> None:
        first = Server(tmp_path)
        await first.host.start()
        run = await first.new_run()
        trainer = first.host.engines.trainer
        trainer.gate.clear()
        asked = [
            (await first.post("/optim_step", {"model_id": run, "seq_id": i, "adam_params": {}}))["request_id"]
            for i in (1, 2, 3)
        ]
        await first.host.journal.close()  # as kill -9 leaves it
        trainer.gate.set()
        await stop(first)

        second = Server(tmp_path)
        await second.host.start()
        if retried:
            again = await second.post("/optim_step", {"model_id": run, "seq_id": 2, "adam_params": {}})
            assert again["request_id"] == asked[1]
        for request_id in asked:
            answer = await second.post("/retrieve_future", {"request_id": request_id})
            assert "error" not in answer
        assert second.host.ledger.state.runs[run].step == 3
        await stop(second)

    scenario(body)
