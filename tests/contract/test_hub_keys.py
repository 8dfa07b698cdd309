"""What the shared service believes of the Hub's tokens when the Hub changes its mind, or is not itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_server import ROOT, Server, on_server, refusal
from tests.support.stub_hub_api import StubHubApi, User
from tuft_jupyter_server.hub import HubKeys, JupyterHub

OnService = Callable[[Callable[[Server, StubHubApi], Awaitable[None]]], None]
STUDENT = "tml-57d"


@pytest.fixture
def on_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnService:
    """A service that believes the Hub for half a second, in which a student may have one run."""
    hub = StubHubApi(monkeypatch)
    hub.users["57d"] = User("eve", groups=("students",))
    groups: dict[str, frozenset[str]] = {}
    limits: dict[str, Any] = {"tenants": [{"group": "students", "per_token_model_limit": 1}]}

    def serve(scenario: Callable[[Server, StubHubApi], Awaitable[None]]) -> None:
        async def body(server: Server) -> None:
            hub.listen()
            keys.hub = JupyterHub()
            looking = asyncio.get_running_loop().create_task(keys.look_again())
            try:
                await scenario(server, hub)
            finally:
                looking.cancel()

        on_server(tmp_path, body, keys=keys, groups=groups, **limits)

    class NotYet:
        """Takes the Hub's place until there is a loop for it."""

    keys = HubKeys(NotYet(), groups, max_age=0.5)  # type: ignore[arg-type]
    return serve


class Feed:
    """One that has begun to tell, with its connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, server: Server, path: str, key: str) -> Feed:
        feed = cls(*await asyncio.open_connection("127.0.0.1", server.port))
        head = f"GET {ROOT}{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n"
        feed.writer.write(head.encode())
        assert (await feed.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        return feed

    async def ends(self) -> bool:
        """Whether the server ends it within a few seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.reader.read()
                return True
        return False


def test_a_signed_token_is_no_better_than_the_hub_s_token_it_stands_for(on_service: OnService) -> None:
    """T7: it is good for an hour, and the Hub's word for half a second."""

    async def body(server: Server, hub: StubHubApi) -> None:
        signed = (await server.post("/auth/token", {}, STUDENT))["jwt"]
        assert (await server.ask("GET", "/sessions", key=signed)).code == 200
        del hub.users["57d"]
        await asyncio.sleep(0.6)
        assert "revoked" in refusal(await server.ask("GET", "/sessions", key=signed))

    on_service(body)


def test_limits_of_a_group_hold_for_a_user_s_issued_key_too(on_service: OnService) -> None:
    """T12: also when the service has just been started, and the user has shown it nothing else."""

    async def body(server: Server, hub: StubHubApi) -> None:
        key = (await server.post("/tuft/keys", {"tenant": "eve"}))["key"]
        session = (await server.new_run(key)).split(":")[0]
        more = {
            "session_id": session,
            "model_seq_id": 1,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        assert "Model limit exceeded: 1/1" in refusal(await server.ask("POST", "/create_model", more, key))
        hub.users["57d"].groups = ("staff",)
        await asyncio.sleep(0.6)
        assert (await server.ask("POST", "/create_model", more, key)).code == 200
        robot = (await server.post("/tuft/keys", {"tenant": "nightly/run"}))["key"]  # no user of the Hub
        assert (await server.ask("GET", "/sessions", key=robot)).code == 200

    on_service(body)


def test_who_is_an_admin_no_longer_stops_hearing_of_others(on_service: OnService) -> None:
    """T7: a feed that was opened as an admin ends, and one's own comes in its place."""

    async def body(server: Server, hub: StubHubApi) -> None:
        hub.users["7a"] = User("ann", admin=True)
        told = await Feed.of(server, "/tuft/feed?tenant=*", "tml-7a")
        own = await Feed.of(server, "/tuft/feed", STUDENT)
        hub.users["7a"].admin = False
        assert await told.ends()
        state = json.loads((await server.ask("GET", "/tuft/state?tenant=*", key="tml-7a")).body)
        assert (state["status"]["tenant"], state["status"]["admin"]) == ("ann", False)
        assert not own.reader.at_eof()

    on_service(body)


def test_a_page_in_the_hub_s_place_vouches_for_nobody_and_is_no_failure_of_ours(
    on_service: OnService,
) -> None:
    """T7: who was vouched for goes on, a stranger is told to come back; and revocations are noticed afterwards."""

    async def body(server: Server, hub: StubHubApi) -> None:
        feed = await Feed.of(server, "/tuft/feed", STUDENT)
        hub.page = "<h1>We are upgrading the proxy</h1>"
        await asyncio.sleep(1.5)
        assert (await server.ask("GET", "/sessions", key=STUDENT)).code == 200
        stranger = await server.ask("GET", "/sessions", key="tml-0ther")
        assert (stranger.code, stranger.headers["Retry-After"]) == (429, "5")
        assert "JupyterHub does not answer" in refusal(stranger)
        hub.page = ""
        del hub.users["57d"]
        assert await feed.ends()

    on_service(body)


def test_a_hub_that_hangs_does_not_hang_those_it_vouched_for(on_service: OnService) -> None:
    """One request waits three seconds and the next ones not at all, where each would have waited for twenty."""

    async def body(server: Server, hub: StubHubApi) -> None:
        assert (await server.ask("GET", "/sessions", key=STUDENT)).code == 200
        hub.hangs = True
        await asyncio.sleep(0.6)
        async with asyncio.timeout(15):
            for _ in range(20):
                assert (await server.ask("GET", "/sessions", key=STUDENT)).code == 200
        hub.hangs = False
        feed = await Feed.of(server, "/tuft/feed", STUDENT)
        del hub.users["57d"]
        assert await feed.ends()

    on_service(body)
