"""A host with scripted engines behind the real HTTP handlers, and what a refusal of theirs must look like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter.core.access import KeyRing
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.tinker import handlers

BOB_KEY = "tml-bob"
ROOT = "/user/alice/tuft/api/v1"


class Server:
    """A host with scripted engines behind real Tornado handlers, below a path prefix."""

    def __init__(
        self,
        home: Path,
        keys: KeyRing | None = None,
        groups: Mapping[str, Collection[str]] | None = None,
        **overrides: Any,
    ) -> None:
        given = {"authorized_users": {BOB_KEY: "bob"}, **overrides}
        settings = load_settings(None, {"TUFT_HOME": str(home)}, given)
        self.host = Host(settings, engines=ScriptedEngines(), keys=keys, groups=groups)
        self.http = HTTPServer(Application(handlers(ROOT, self.host.api, self.host.keys, 2**22)))
        socket, self.port = bind_unused_port()
        self.http.add_socket(socket)
        self.client = AsyncHTTPClient(force_instance=True, max_clients=100)

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = "",
        headers: dict[str, str] | None = None,
    ) -> HTTPResponse:
        """One request; ``key`` "" is the owner's, None sends none."""
        headers = dict(headers or {})
        if key is not None:
            headers["X-API-Key"] = key or self.host.key
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if method in ("POST", "PUT") and body is None:
            body = b"{}"
        url = f"http://127.0.0.1:{self.port}{ROOT}{path}"
        return await self.client.fetch(url, method=method, body=body, headers=headers, raise_error=False)

    async def post(self, path: str, body: Any, key: str | None = "") -> Any:
        response = await self.ask("POST", path, body, key)
        assert response.code == 200, response.body
        return json.loads(response.body)

    async def new_run(self, key: str = "") -> str:
        session = (await self.post("/create_session", {}, key))["session_id"]
        made = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        promise = await self.post("/create_model", made, key)
        answer = await self.post("/retrieve_future", {"request_id": promise["request_id"]}, key)
        assert "error" not in answer
        return f"{session}:train:0"


def on_server(tmp_path: Path, body: Callable[[Server], Awaitable[None]], **overrides: Any) -> None:
    async def scenario() -> None:
        server = Server(tmp_path, **overrides)
        await server.host.start()
        try:
            async with asyncio.timeout(60):
                await body(server)
        finally:
            server.http.stop()
            await server.host.stop()

    asyncio.run(scenario())


def filled(path: str, **parts: str) -> str:
    values = {
        "session": "s",
        "run": "s:train:0",
        "sampler": "s:sample:0",
        "kind": "weights",
        "name": "n",
        **parts,
    }
    for name, value in values.items():
        path = path.replace("{" + name + "}", value)
    return path


def refusal(response: HTTPResponse) -> str:
    """The text of a refusal: always JSON of one shape, never with a traceback, never a 402, 409 or 5xx."""
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.body)
    assert set(body) == {"detail", "error", "category"}
    assert "Traceback" not in body["detail"]
    assert 400 <= response.code < 500
    assert response.code not in (402, 409)
    return str(body["detail"])
