"""As much of JupyterHub's REST API as a service of it asks: whom a token speaks for, and what a user is.

The real one: tests/contract/test_jupyterhub.py. This one can change its mind between two requests.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

ACCESS = "access:services!service=tuft"
SERVICE_TOKEN = "5e59ce"


@dataclass
class User:
    name: str
    admin: bool = False
    groups: tuple[str, ...] = ()

    def model(self) -> dict[str, Any]:
        return {"kind": "user", "name": self.name, "admin": self.admin, "groups": list(self.groups)}


class StubHubApi:
    """``users`` by their tokens; ``page``, where it is set, comes in place of every answer, as from a proxy.

    Nothing is answered while ``hangs``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: dict[str, User] = {}
        self.page = ""
        self.hangs = False
        socket, port = bind_unused_port()
        self._socket = socket
        for name, value in (
            ("JUPYTERHUB_API_URL", f"http://127.0.0.1:{port}/hub/api"),
            ("JUPYTERHUB_API_TOKEN", SERVICE_TOKEN),
            ("JUPYTERHUB_OAUTH_ACCESS_SCOPES", json.dumps([ACCESS])),
        ):
            monkeypatch.setenv(name, value)

    def listen(self) -> None:
        """On the running loop, until that ends."""
        api = self

        class Answer(RequestHandler):
            async def get(self, name: str = "") -> None:
                while api.hangs:  # noqa: ASYNC110 - until the test says so
                    await asyncio.sleep(0.05)
                if api.page:
                    self.finish(api.page)
                elif name:
                    self.tell(next((user for user in api.users.values() if user.name == name), None), 404)
                else:
                    token = self.request.headers["Authorization"].removeprefix("token ")
                    self.tell(api.users.get(token), 403)

            def tell(self, user: User | None, otherwise: int) -> None:
                self.set_status(200 if user else otherwise)
                self.finish({**user.model(), "scopes": [ACCESS]} if user else {"status": otherwise})

        paths = [("/hub/api/user", Answer), ("/hub/api/users/([^/]+)", Answer)]
        HTTPServer(Application(paths)).add_socket(self._socket)  # type: ignore[arg-type]
