"""A server that is being started: nothing seems to be gone, nobody waits without an end, and one server writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from tests.support.http_server import ROOT, Server
from tuft_jupyter.core.journal import Sink
from tuft_jupyter_server import host as hosts


def scenario(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


async def stop(server: Server) -> None:
    server.http.stop()
    await server.host.stop()


def test_while_the_journal_is_read_requests_wait_and_nothing_seems_to_be_gone(tmp_path: Path) -> None:
    """F2, P4, S1-48: a client that is quicker than the recovery is not told that its model does not exist."""

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
        while not second.host._tried._waiters:  # noqa: ASYNC110 - until it has arrived
            await asyncio.sleep(0.01)
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


def test_a_journal_that_cannot_be_understood_is_the_reason_that_is_given(tmp_path: Path) -> None:
    """Not that it is being read, for ever; and a notebook server goes on without us."""

    async def body() -> None:
        first = Server(tmp_path)
        await first.host.start()
        with pytest.raises(KeyError):  # it is durable, and no server can do anything with it
            await first.host.ledger.record("op_done", "alice", {"request_id": "r", "run": "none"})
        await stop(first)
        second = Server(tmp_path)
        await second.host.start()
        refused = await second.ask("POST", "/create_session", {})
        assert (refused.code, "it could not start (KeyError: 'none')" in refused.body.decode()) == (429, True)
        assert "KeyError" in json.loads((await second.ask("GET", "/tuft/status")).body)["problem"]
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


def test_whatever_is_asked_of_a_server_that_waits_is_sent_on_to_the_one_that_writes(tmp_path: Path) -> None:
    """S1-52: path, query, key and a body of megabytes; only whether it is alive it says itself."""

    async def body() -> None:
        first, second = Server(tmp_path), Server(tmp_path)
        await first.host.start()
        await second.host.start()
        second.host.journal.elsewhere = f"http://127.0.0.1:{first.port}{ROOT.removesuffix('/api/v1')}"
        headers = {"X-API-Key": first.host.key}
        url = f"http://127.0.0.1:{second.port}{ROOT}"
        async with httpx.AsyncClient(follow_redirects=True, headers=headers) as client:
            large = await client.post(f"{url}/forward_backward", content=b"[" * (3 * 2**20))
            assert (large.status_code, large.url.port) == (
                400,
                first.port,
            )  # what the first says of such a body
            run = await first.new_run()
            found = await client.get(f"{url}/training_runs?limit=1&offset=0")
            assert [each["training_run_id"] for each in found.json()["training_runs"]] == [run]
            assert str(found.url).startswith(f"http://127.0.0.1:{first.port}/")
            assert (await client.get(f"{url}/healthz")).url.port == second.port
        moved = await second.client.fetch(
            f"{url}/get_server_capabilities", headers=headers, follow_redirects=False, raise_error=False
        )
        assert moved.code == 307
        assert f":{first.port}/" in json.loads(moved.body)["detail"]
        await stop(second)
        await stop(first)

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
