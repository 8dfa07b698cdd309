"""Limits over real HTTP: requests are held, not failed, whichever key of a tenant they come with."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from tests.support.http_server import Server, on_server, refusal
from tuft_jupyter.core.journal import Record
from tuft_jupyter_server.hub import HubKeys, HubUser


def step(run: str, seq: int) -> dict[str, object]:
    return {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-4}}


def test_the_third_request_of_a_second_is_late_and_right_and_others_are_not(tmp_path: Path) -> None:
    """S2-42, T12: two keys of one tenant share its rate; somebody else's requests pass."""

    async def body(server: Server) -> None:
        keys = [(await server.post("/tuft/keys", {"tenant": "carol"}))["key"] for _ in range(2)]
        run, other = await server.new_run(keys[0]), await server.new_run()
        began = time.monotonic()
        asked = [
            asyncio.ensure_future(server.post("/optim_step", step(run, seq), keys[seq % 2]))
            for seq in range(1, 6)
        ]
        await server.post("/optim_step", step(other, 1))
        assert not all(held.done() for held in asked)
        promises = await asyncio.gather(*asked)
        assert time.monotonic() - began > 1.0
        for promise in promises:
            answer = await server.post("/retrieve_future", {"request_id": promise["request_id"]}, keys[1])
            assert "error" not in answer
        steps = [r.step for r in server.host.ledger.state.runs.values() if r.id == run]
        assert steps == [5]

    on_server(tmp_path, body, rps_limit=2)


def test_too_much_at_once_is_answered_429_with_the_time_to_come_back(tmp_path: Path) -> None:
    """S2-42, S2-44."""

    async def body(server: Server) -> None:
        key = (await server.post("/tuft/keys", {"tenant": "carol"}))["key"]
        run = await server.new_run(key)
        asked = [
            asyncio.ensure_future(server.ask("POST", "/optim_step", step(run, seq), key))
            for seq in range(1, 9)
        ]
        late = [answer for answer in await asyncio.gather(*asked) if answer.code != 200]
        assert {answer.code for answer in late} == {429}
        assert int(late[0].headers["Retry-After"]) >= 1
        assert "paused_rate_limit" in refusal(late[0])
        session = (await server.post("/create_session", {}, key))["session_id"]
        made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        sampler = (await server.post("/create_sampling_session", made, key))["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1] * 11}]}
        sample = {"sampling_session_id": sampler, "seq_id": 1, "prompt": prompt, "num_samples": 1}
        answer = await server.ask("POST", "/asample", {**sample, "sampling_params": {"max_tokens": 1}}, key)
        assert answer.code == 400
        assert "Input tokens (11) exceed maximum allowed (10)" in json.loads(answer.body)["error"]

    on_server(tmp_path, body, rps_limit=0.2, max_input_tokens=10)


def test_a_session_and_a_sampler_too_many_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """T12: 400, because waiting does not help; nobody else is held up, and the lists say what there is."""

    async def body(server: Server) -> None:
        key = (await server.post("/tuft/keys", {"tenant": "carol"}))["key"]
        runs = [await server.new_run(key) for _ in range(2)]
        answer = await server.ask("POST", "/create_session", {}, key)
        assert (answer.code, "Session limit exceeded: 2/2" in refusal(answer)) == (400, True)
        await server.post("/create_session", {})
        for run in runs:
            saved = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
            answer = await server.ask("POST", "/save_weights_for_sampler", saved, key)
            if run == runs[0]:
                promise = json.loads(answer.body)
                done = await server.post("/retrieve_future", {"request_id": promise["request_id"]}, key)
                assert "error" not in done
        assert (answer.code, "Sampler limit exceeded: 1/1" in refusal(answer)) == (400, True)
        await server.post(f"/sessions/{runs[0].split(':')[0]}/finish", {"reason": {"type": "success"}}, key)
        await server.post("/create_session", {}, key)
        await server.post("/save_weights_for_sampler", saved, key)

    on_server(tmp_path, body, max_sessions=2, max_samplers=1)


def test_a_group_of_the_hub_has_limits_of_its_own_and_the_hub_s_word_changes_them(tmp_path: Path) -> None:
    """S2-29, T12: what a group may hold goes by what the Hub says of its members, token by token."""
    members = {"5d1": "students", "5d2": "students", "57aff": "staff"}
    tenants = {"5d1": "eve", "5d2": "eve", "57aff": "ann"}

    class Groups:
        async def user(self, token: str) -> HubUser | None:
            return HubUser(tenants[token], groups=frozenset({members[token]})) if token in tenants else None

        async def groups(self, name: str) -> frozenset[str]:
            return frozenset(members[token] for token in tenants if tenants[token] == name)

    async def body(server: Server) -> None:
        assert await server.new_run("tml-5d1")
        (session,) = json.loads((await server.ask("GET", "/sessions", key="tml-5d2")).body)["sessions"]
        made = {
            "session_id": session,
            "model_seq_id": 1,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        full = await server.ask("POST", "/create_model", made, "tml-5d2")
        assert "Model limit exceeded: 1/1" in refusal(full)
        for _ in range(3):
            assert await server.new_run("tml-57aff")
        members.update({"5d1": "staff", "5d2": "staff"})
        assert (await server.ask("POST", "/create_model", made, "tml-5d2")).code == 200

    groups: dict[str, frozenset[str]] = {}
    keys = HubKeys(Groups(), groups, max_age=0.0)
    students = {"group": "students", "per_token_model_limit": 1}
    on_server(tmp_path, body, keys=keys, groups=groups, tenants=[students])


def test_a_model_s_training_limit_leaves_its_sampling_alone(tmp_path: Path) -> None:
    """S2-57: queue_config of the model application at its limit, and samples of the same tenant pass at once."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        session = run.split(":")[0]
        made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        sampler = (await server.post("/create_sampling_session", made))["sampling_session_id"]
        held = [asyncio.ensure_future(server.post("/optim_step", step(run, seq))) for seq in range(1, 4)]
        until = time.monotonic() + 10
        while not server.host.service.quotas.paused(server.host.owner.tenant):
            assert time.monotonic() < until
            await asyncio.sleep(0)
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
        sample = {"sampling_session_id": sampler, "seq_id": 1, "prompt": prompt, "num_samples": 1}
        promise = await server.post("/asample", {**sample, "sampling_params": {"max_tokens": 1}})
        drawn = await server.ask("POST", "/retrieve_future", {"request_id": promise["request_id"]})
        assert (drawn.code, drawn.body) == (200, b"base")
        assert not all(asked.done() for asked in held)
        for promise in await asyncio.gather(*held):
            assert "error" not in await server.post("/retrieve_future", {"request_id": promise["request_id"]})

    model = {"model_name": "tuft/demo", "training_queue": {"rps_limit": 1}}
    on_server(tmp_path, body, supported_models=[model])


def test_requests_beyond_those_at_work_are_told_to_come_back_and_polls_do_not_count(tmp_path: Path) -> None:
    """S2-32: 429 with Retry-After, never a 5xx; what waits for an answer takes nobody's place."""

    async def body(server: Server) -> None:
        key = (await server.post("/tuft/keys", {"tenant": "carol"}))["key"]
        run = await server.new_run(key)
        server.host.engines.trainer.gate.clear()
        first = (await server.post("/optim_step", step(run, 1), key))["request_id"]
        polls = [
            asyncio.ensure_future(server.ask("POST", "/retrieve_future", {"request_id": first}, key))
            for _ in range(4)
        ]
        asked = [
            asyncio.ensure_future(server.ask("POST", "/optim_step", step(run, seq), key))
            for seq in range(2, 14)
        ]
        answers = await asyncio.gather(*asked)
        refused = [answer for answer in answers if answer.code != 200]
        assert len(answers) - len(refused) >= 2
        assert len(refused) >= 4
        for answer in refused:
            assert (answer.code, answer.headers["Retry-After"]) == (429, "1")
            assert "as many as this server takes at once (max_ongoing_requests)" in refusal(answer)
        assert (await server.ask("GET", "/sessions", key=key)).code == 200
        server.host.engines.trainer.gate.set()
        assert {answer.code for answer in await asyncio.gather(*polls)} == {200}

    on_server(tmp_path, body, max_ongoing_requests=2, rps_limit=2)


def test_sixty_requests_at_once_wait_or_come_back_and_none_is_lost(tmp_path: Path) -> None:
    """S2-32: fifty are at work while the disk is slow, ten are told to come back, and do."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        journal, slow = server.host.journal, asyncio.Event()
        append = journal.append

        async def waits(record: Record) -> Record:
            await slow.wait()
            return await append(record)

        journal.append = waits  # type: ignore[method-assign]
        asked = {
            asyncio.ensure_future(server.ask("POST", "/optim_step", step(run, seq))): seq
            for seq in range(1, 61)
        }
        early = asyncio.as_completed([*asked])
        for _ in range(10):
            answer = await next(early)
            assert (answer.code, answer.headers["Retry-After"]) == (429, "1")
        slow.set()
        answers = {asked[future]: await future for future in asked}
        taken = {seq: answer for seq, answer in answers.items() if answer.code == 200}
        assert len(taken) == 50
        for seq in answers.keys() - taken.keys():
            taken[seq] = await server.ask("POST", "/optim_step", step(run, seq))
        for seq in sorted(taken):
            promise = json.loads(taken[seq].body)
            outcome = await server.post("/retrieve_future", {"request_id": promise["request_id"]})
            assert "error" not in outcome
        assert server.host.ledger.state.runs[run].step == 60

    on_server(tmp_path, body, max_ongoing_requests=50)
