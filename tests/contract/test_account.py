"""Keys, tokens, usage, search and copies, over real HTTP, as their owner and as somebody else."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.contract.test_transfer import WEIGHTS, of, saved
from tests.support.http_server import BOB_KEY, Server, on_server, refusal
from tuft_jupyter.core.curve import Column
from tuft_jupyter.wire import tickets


async def told(server: Server, path: str, key: str = "") -> Any:
    response = await server.ask("GET", path, key=key)
    assert response.code == 200, response.body
    return json.loads(response.body)


def test_a_token_stands_for_its_key_until_it_expires_or_the_key_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        token = (await server.post("/auth/token", {}, BOB_KEY))["jwt"]
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["sub"] == "tuft:tenant:bob"
        assert claims["exp"] > claims["iat"]
        session = (await server.post("/create_session", {}, token))["session_id"]
        assert (await told(server, "/sessions", BOB_KEY))["sessions"] == [session]
        assert "send the key itself" in refusal(await server.ask("POST", "/auth/token", {}, token))
        forged = jwt.encode(claims, "x" * 64, "HS256")
        unsigned = jwt.encode(claims, None, "none")
        address = (await told(server, of(await saved(server)) + "/archive"))["url"].rpartition("/")[2]
        for wrong in (forged, unsigned, token[:-4] + "AAAA", address):
            assert (await server.ask("GET", "/sessions", key=wrong)).code == 403
        assert (await server.ask("GET", f"/tuft/files/{token}", key=None)).code == 403
        monkeypatch.setattr(tickets, "TOKEN_SECONDS", -1)
        old = (await server.post("/auth/token", {}, BOB_KEY))["jwt"]
        assert "expired" in refusal(await server.ask("GET", "/sessions", key=old))
        assert (await server.ask("DELETE", "/auth/apikey/me", key=BOB_KEY)).code == 200
        for gone in (BOB_KEY, token):
            assert (await server.ask("GET", "/sessions", key=gone)).code == 403

    on_server(tmp_path, body)


def test_a_key_that_was_given_up_stays_so_after_a_restart(tmp_path: Path) -> None:
    async def before(server: Server) -> None:
        assert (await told(server, "/auth/apikey/me", BOB_KEY))["details"]["user_details"]["email"] == "bob"
        assert (await server.ask("DELETE", "/auth/apikey/me", key=BOB_KEY)).code == 200
        assert "own key" in refusal(await server.ask("DELETE", "/auth/apikey/me"))

    async def after(server: Server) -> None:
        assert (await server.ask("GET", "/sessions", key=BOB_KEY)).code == 403
        assert (await server.ask("GET", "/sessions")).code == 200

    on_server(tmp_path, before)
    on_server(tmp_path, after)


def test_a_copy_is_deleted_by_itself_and_stays_after_a_restart(tmp_path: Path) -> None:
    copies: list[str] = []

    async def before(server: Server) -> None:
        source = await saved(server)
        asked = {"source_path": source, "destination_project_id": "p"}
        assert (await server.ask("POST", "/copy_weights", asked, BOB_KEY)).code == 404
        await server.ask("POST", of(source) + "/publish")
        copies.append((await server.post("/copy_weights", asked, BOB_KEY))["tinker_path"])
        session = copies[0].removeprefix("tinker://").split(":")[0]
        mine = (await server.post("/create_session", {}))["session_id"]
        foreign = {"source_path": source, "session_id": mine, "model_seq_id": 0}
        assert (await server.ask("POST", "/copy_weights", foreign, BOB_KEY)).code == 404
        twice = {"source_path": source, "session_id": session, "model_seq_id": 5}
        assert await server.post("/copy_weights", twice, BOB_KEY) == await server.post(
            "/copy_weights", twice, BOB_KEY
        )
        found = (await server.post("/sessions/search", {"project_ids": ["p"]}, BOB_KEY))["sessions"]
        assert [(s["session_id"], s["checkpoints_count"]) for s in found] == [(session, 2)]
        runs = await told(server, "/training_runs?project_id=p", BOB_KEY)
        assert (len(runs["training_runs"]), runs["cursor"]["total_count"]) == (2, 2)
        assert (await told(server, "/training_runs?project_id=q", BOB_KEY))["training_runs"] == []
        assert (await server.ask("DELETE", of(source))).code == 200

    async def after(server: Server) -> None:
        (copy,) = copies
        assert (await server.ask("GET", of(copy) + "/archive")).code == 200, "the server's owner may"
        url = (await told(server, of(copy) + "/archive", BOB_KEY))["url"]
        assert WEIGHTS in (await server.client.fetch(url)).body
        run = copy.removeprefix("tinker://").split("/")[0]
        refused = await server.ask("POST", "/optim_step", {"model_id": run, "adam_params": {}}, BOB_KEY)
        assert "cannot be used" in refusal(refused)

    on_server(tmp_path, before)
    on_server(tmp_path, after)


def test_sessions_are_found_by_what_is_known_of_them_page_by_page(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        made = []
        for i in range(5):
            named = {"display_name": f"Run number {i}", "user_metadata": {"odd": str(i % 2)}}
            made.append((await server.post("/create_session", named))["session_id"])
        await server.post("/create_session", {"display_name": "run of bob"}, BOB_KEY)
        await server.ask("PUT", f"/sessions/{made[0]}/project", {"project_id": "p"})
        await server.ask("POST", f"/sessions/{made[1]}/finish", {"reason": {"type": "success"}})

        async def found(**asked: Any) -> list[int]:
            sessions = (await server.post("/sessions/search", asked))["sessions"]
            return [made.index(s["session_id"]) for s in sessions]

        assert await found() == [4, 3, 2, 1, 0]
        assert await found(display_name="NUMBER run") == [4, 3, 2, 1, 0]
        assert await found(display_name="number 3", session_id=made[0]) == [3, 0]
        assert await found(user_metadata={"odd": "1"}) == [3, 1]
        assert await found(project_ids=["p"]) == [0]
        assert await found(statuses=[{"type": "client_finished", "reasons": ["success"]}]) == [1]
        assert await found(owner={"type": "user", "owner_urns": ["tuft:tenant:bob"]}) == []
        seen, cursor = [], None
        for _ in range(3):
            page = await server.post("/sessions/search", {"limit": 2, "cursor": cursor})
            seen += [made.index(s["session_id"]) for s in page["sessions"]]
            cursor = page["next_cursor"]
        assert (seen, cursor) == ([4, 3, 2, 1, 0], None)
        assert (await server.ask("POST", "/sessions/search", {"limit": 0})).code == 400
        for year, listed in (("0001", []), ("9999", [4, 3, 2, 1, 0])):  # without a zone, as the rest: UTC
            other = {"last_created_at": f"{year}-01-01T00:00:00", "last_session_id": "forgotten"}
            assert await found(cursor=other) == listed

    on_server(tmp_path, body)


def test_clients_that_join_a_sampler_get_numbers_of_their_own_also_after_a_restart(tmp_path: Path) -> None:
    async def joined(server: Server) -> int:
        (sampler,) = server.host.ledger.state.samplers
        asked = {"sampling_session_id": sampler}
        assert (await server.ask("POST", "/join_sampling_session", asked, BOB_KEY)).code == 404
        return int((await server.post("/join_sampling_session", asked))["client_counter"])

    async def before(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        await server.post("/create_sampling_session", made)
        assert [await joined(server), await joined(server)] == [1, 2]

    async def after(server: Server) -> None:
        assert await joined(server) == 3

    on_server(tmp_path, before)
    on_server(tmp_path, after)


def test_usage_and_audit_tell_what_the_caller_did_and_nothing_of_others(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        path = await saved(server)
        run = path.removeprefix("tinker://").split("/")[0]
        step = {"model_id": run, "seq_id": 3, "adam_params": {}}
        state = server.host.ledger.state
        promise = await server.post("/optim_step", step)
        await server.post("/retrieve_future", promise)
        state.runs[run].curve["tokens"] = Column(
            [64], whole=True
        )  # as a pass of 64 tokens before the step would
        opened = {"session_id": run.split(":")[0], "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        sampler = (await server.post("/create_sampling_session", opened))["sampling_session_id"]
        promise = await server.post("/asample", {"sampling_session_id": sampler, "seq_id": 0})
        assert (await server.ask("POST", "/retrieve_future", promise)).body == b"base"
        now = datetime.now(UTC)
        window = (now - timedelta(days=1), now + timedelta(days=1))
        query = "?starting_on={}&ending_before={}".format(*(t.strftime("%Y-%m-%dT%H:00:00Z") for t in window))
        used = await told(server, "/billing/usage/events" + query)
        kinds = {e["event_info"]["type"]: e["event_info"] for e in used["data"]}
        assert kinds["training"]["token_count"] == 64
        assert kinds["checkpoint"]["count"] == 1
        assert kinds["sampling_prefill"] == {"type": "sampling_prefill", "token_count": 3, "cached": False}
        assert kinds["sampling_sample"]["token_count"] == 4
        assert {e["session_id"] for e in used["data"]} == {run.split(":")[0]}
        assert used["sessions"][run.split(":")[0]]["engine_seconds"] > 0
        (storage,) = (await told(server, "/billing/usage/checkpoints/current"))["data"]
        assert (storage["checkpoint_count"], storage["size_bytes"]) == (1, 1)
        events = [entry["event"] for entry in (await told(server, "/audit"))["entries"]]
        assert events == ["session_create", "training_run_create", "checkpoint_create"]
        assert (await told(server, "/audit?day=2001-01-01"))["entries"] == []
        assert (await told(server, "/billing/usage/events" + query, BOB_KEY))["data"] == []
        assert (await told(server, "/billing/usage/checkpoints/current", BOB_KEY))["data"] == []
        assert (await told(server, "/audit", BOB_KEY))["entries"] == []
        for wrong in ("", "?starting_on=x&ending_before=y", query.replace("-", "+", 1)):
            assert (await server.ask("GET", "/billing/usage/events" + wrong)).code == 400

    on_server(tmp_path, body)


def test_a_trace_is_said_not_to_be_kept(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        answer = await told(server, f"/sessions/{session}/trace_export")
        assert answer["status"] == "failed"
        assert "no traces" in answer["error"]
        assert (await server.ask("GET", f"/sessions/{session}/trace_export", key=BOB_KEY)).code == 404

    on_server(tmp_path, body)
