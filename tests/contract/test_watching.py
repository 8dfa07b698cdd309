"""Watching one's own work over real HTTP: what has changed, the points of a curve, taking a live run over."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.fake_engine import FakeEngines
from tests.support.http_server import BOB_KEY, Server, on_server, refusal


async def ask_step(server: Server, run: str, seq: int) -> str:
    asked = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-3}}
    request_id: str = (await server.post("/optim_step", asked))["request_id"]
    return request_id


async def train_step(server: Server, run: str, seq: int) -> None:
    await server.post("/retrieve_future", {"request_id": await ask_step(server, run, seq)})


async def look(server: Server, query: str = "", key: str = "") -> dict[str, Any]:
    response = await server.ask("GET", f"/tuft/outlook{query}", key=key)
    assert response.code == 200
    seen: dict[str, Any] = json.loads(response.body)
    return seen


def test_a_watcher_waits_until_its_own_work_changes(tmp_path: Path) -> None:
    """No polling; other tenants' work neither wakes nor shows."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        seen = await look(server)
        assert [each["id"] for each in seen["runs"]] == [run]
        waiting = asyncio.create_task(look(server, f"?seen={seen['version']}"))
        await server.new_run(BOB_KEY)
        feed = server.host.ledger.feed
        while not feed:  # noqa: ASYNC110 - the feed itself says when somebody listens
            await asyncio.sleep(0)
        assert (await look(server))["version"] == seen["version"]
        assert not waiting.done()
        await train_step(server, run, 1)
        changed = await waiting
        assert changed["version"] != seen["version"]
        assert (await look(server))["runs"][0]["step"] == 1
        assert [each["tenant"] for each in (await look(server, key=BOB_KEY))["runs"]] == ["bob"]

    on_server(tmp_path, body)


def test_a_curve_is_told_from_any_point_on(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        run = await server.new_run()
        for n in range(3):
            await train_step(server, run, n + 1)
        for start, steps in ((0, [1, 2, 3]), (2, [3]), (9, [])):
            answer = await server.ask("GET", f"/tuft/runs/{run}/curve?start={start}")
            assert json.loads(answer.body)["columns"]["step"] == steps
        foreign = await server.ask("GET", f"/tuft/runs/{run}/curve", key=BOB_KEY)
        assert foreign.code == 404
        assert "start" in refusal(await server.ask("GET", f"/tuft/runs/{run}/curve?start=-1"))

    on_server(tmp_path, body)


def test_another_session_goes_on_with_a_live_run(tmp_path: Path) -> None:
    """The same model id, a request number that was not used, and samplers under the session that asks for them;
    also after the old session was finished."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        await train_step(server, run, 1)
        await server.post(f"/sessions/{run.split(':')[0]}/finish", {"reason": {"type": "success"}})
        asked = {"model_id": run, "seq_id": 2, "adam_params": {}}
        assert "finished" in refusal(await server.ask("POST", "/optim_step", asked))
        session = (await server.post("/create_session", {}))["session_id"]
        taken = await server.post(f"/tuft/runs/{run}/resume", {"session_id": session})
        assert taken == {
            "model_id": run, "base_model": "tuft/demo", "step": 1, "pending": 0, "next_seq": 2,
        }  # fmt: skip
        await train_step(server, run, taken["next_seq"])
        asked = {"model_id": run, "seq_id": 3, "sampling_session_seq_id": 0}
        promise = await server.post("/save_weights_for_sampler", asked)
        await server.post("/retrieve_future", {"request_id": promise["request_id"]})
        assert list(server.host.ledger.state.samplers) == [f"{session}:sample:0"]
        assert (await look(server))["runs"][0]["step"] == 2

    on_server(tmp_path, body)


def test_nobody_takes_over_what_is_not_theirs(tmp_path: Path) -> None:
    """T1: neither a foreign run nor, with one's own run, a foreign session."""

    async def body(server: Server) -> None:
        run, bobs = await server.new_run(), await server.new_run(BOB_KEY)
        before = await look(server)
        bobs_session = bobs.split(":")[0]
        refused = await server.ask(
            "POST", f"/tuft/runs/{run}/resume", {"session_id": bobs_session}, key=BOB_KEY
        )
        assert refused.code == 404
        # The owner of the server may look at everything, but a run stays with its tenant.
        assert "different owners" in refusal(
            await server.ask("POST", f"/tuft/runs/{run}/resume", {"session_id": bobs_session})
        )
        assert await look(server) == before

    on_server(tmp_path, body)


def test_a_run_says_in_a_sentence_why_it_waits(tmp_path: Path) -> None:
    """Nothing asked, waiting its turn beside another run, and the last error until something succeeds."""

    async def why(server: Server, run: str) -> str:
        (text,) = [each["why"] for each in (await look(server))["runs"] if each["id"] == run]
        return str(text)

    async def body(server: Server) -> None:
        engines: Any = server.host.engines
        run, other = await server.new_run(), await server.new_run()
        assert "nothing is asked of it" in await why(server, run)
        engines.trainer.gate.clear()
        asked = await ask_step(server, run, 1)
        assert "1 of its requests is accepted" in await why(server, run)
        assert "works on nothing else" in await why(server, run)
        await ask_step(server, other, 1)
        assert "1 other run shares the engine" in await why(server, run)
        engines.trainer.gate.set()
        await server.post("/retrieve_future", {"request_id": asked})
        missing = {"model_id": run, "seq_id": 2, "path": f"tinker://{run}/weights/none"}
        assert "does not exist" in refusal(await server.ask("POST", "/load_weights", missing))
        assert "nothing is asked of it" in await why(server, run)

    on_server(tmp_path, body)


def test_a_limit_that_holds_requests_back_is_named(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        quotas, tenant = server.host.service.quotas, server.host.owner.tenant
        run = await server.new_run()
        quotas.default = replace(quotas.default, requests_per_second=2.0)
        asked = [asyncio.create_task(ask_step(server, run, n)) for n in (1, 2, 3, 4)]
        while not quotas.paused(tenant):  # noqa: ASYNC110 - the quotas themselves say when somebody is held
            await asyncio.sleep(0)
        (shown,) = (await look(server))["runs"]
        assert "lets you have 2 requests a second (rps_limit" in shown["why"]
        await asyncio.gather(*asked)

    on_server(tmp_path, body)


def test_the_machine_is_measured_for_whoever_asks(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        measured = json.loads((await server.ask("GET", "/tuft/gauges", key=BOB_KEY)).body)
        assert 0 < measured["memory"]["used"] < measured["memory"]["total"]
        assert measured["workers"]

    on_server(tmp_path, body)


def test_everybody_sees_the_mesh_and_only_the_owner_the_nodes(tmp_path: Path) -> None:
    """S2-65: the mesh of each placed model is in the status; addresses of nodes are the owner's alone."""
    placed = {
        "model": "m",
        "mode": "separate",
        "mesh": {"data_parallel": 2},
        "processes": [{"ip": "10.0.0.9"}],
    }

    async def body(server: Server) -> None:
        server.host.engines.placements = lambda: [placed]
        own = json.loads((await server.ask("GET", "/tuft/status")).body)
        assert own["placements"] == [placed]
        others = json.loads((await server.ask("GET", "/tuft/status", key=BOB_KEY)).body)["placements"]
        assert others == [{key: value for key, value in placed.items() if key != "processes"}]
        ray = json.loads((await server.ask("GET", "/tuft/ray")).body)
        assert ray["nodes"] == []
        assert ray["commands"]["head"].startswith("ray start --head")
        assert (await server.ask("GET", "/tuft/ray", key=BOB_KEY)).code == 403

    on_server(tmp_path, body)


async def sampled(server: Server, path: str, token: int, key: str = "") -> None:
    """Draw from the weights that ``path`` names, in a session of one's own."""
    session = (await server.post("/create_session", {}, key))["session_id"]
    opened = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    sampler = (await server.post("/create_sampling_session", opened, key))["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [token]}]}
    asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "num_samples": 2}
    asked["sampling_params"] = {"max_tokens": 2, "temperature": 0.5}
    promise = await server.post("/asample", asked, key)
    answer = await server.ask("POST", "/retrieve_future", {"request_id": promise["request_id"]}, key)
    assert answer.code == 200


def drawing(server: Server) -> Server:
    """The server with engines that save and draw as the real ones do."""
    engines = FakeEngines()
    vars(server.host.engines).update(trainer=engines.trainer, sampler=engines.sampler)
    return server


async def saved(server: Server, run: str, seq: int, key: str = "") -> str:
    asked = {"model_id": run, "seq_id": seq, "path": f"at-{seq}"}
    promise = await server.post("/save_weights_for_sampler", asked, key)
    answer = await server.post("/retrieve_future", {"request_id": promise["request_id"]}, key)
    return str(answer["path"])


async def said(server: Server, run: str, step: int, key: str = "") -> dict[str, Any]:
    response = await server.ask("GET", f"/tuft/runs/{run}/samples?step={step}", key=key)
    assert response.code == 200, response.body
    shown: dict[str, Any] = json.loads(response.body)
    return shown


def test_what_the_weights_of_a_step_said_is_shown_to_whoever_asked_them_only(tmp_path: Path) -> None:
    """Prompts are their owner's: an admin sees the run, and not what another tenant asked its weights."""

    async def body(server: Server) -> None:
        run = await drawing(server).new_run(BOB_KEY)
        await sampled(server, await saved(server, run, 1, BOB_KEY), 7, BOB_KEY)
        shown = await said(server, run, 5, BOB_KEY)
        assert (shown["step"], shown["steps"], shown["keeping"]) == (0, [0], True)
        (asked,) = shown["samples"]
        assert asked["prompt"]["tokens"] == [7]
        assert asked["prompt"]["text"] is not None
        assert (asked["temperature"], asked["sequences"], len(asked["answers"])) == (0.5, 2, 2)
        assert asked["answers"][0]["stop_reason"] == "length"
        assert len(asked["answers"][0]["tokens"]) == 2
        assert (await said(server, run, 5))["samples"] == [], "the owner of the server asked nothing"
        assert "step" in refusal(await server.ask("GET", f"/tuft/runs/{run}/samples?step=soon", key=BOB_KEY))
        mine = await server.new_run()
        assert (await server.ask("GET", f"/tuft/runs/{mine}/samples", key=BOB_KEY)).code == 404

    on_server(tmp_path, body)


def test_samples_are_shown_by_step_and_a_switch_keeps_none(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        run = await drawing(server).new_run()
        await train_step(server, run, 1)
        await sampled(server, await saved(server, run, 2), 11)
        await train_step(server, run, 3)
        await sampled(server, await saved(server, run, 4), 22)
        keeping = server.host.settings.keep_samples
        assert (await said(server, run, 1))["steps"] == ([1, 2] if keeping else [])
        for step, token in ((1, 11), (2, 22), (99, 22)):
            shown = await said(server, run, step)
            assert shown["keeping"] is keeping
            asked = [each["prompt"]["tokens"] for each in shown["samples"]]
            assert asked == ([[token]] if keeping else [])

    on_server(tmp_path / "kept", body)
    on_server(tmp_path / "not", body, keep_samples=False)
