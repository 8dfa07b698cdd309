"""What is left of the service when its configuration cannot be used: one sentence that says why.

The notebook server goes on. The panel shows the sentence, and a client gets it as the answer to whatever it asks.
"""

from __future__ import annotations

from typing import Any

import msgspec
from jupyter_server.auth.decorator import allow_unauthenticated, authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web


class Why(APIHandler):
    """503 and the reason, to whoever may use this server's lab."""

    auth_resource = "tuft"
    _track_activity = False

    def initialize(self, problem: str) -> None:
        self.problem = problem

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self._answer(self.problem)

    def _answer(self, problem: str, status: int = 503) -> None:
        self.set_status(status)
        self.finish(
            msgspec.json.encode(
                {"problem": problem, "detail": problem, "error": problem, "category": "server"}
            )
        )


class Unusable(Why):
    """The same to a client with a key, without what only the owner should read: paths and values.

    400, because it does not get better by itself: after a 503 the SDK would ask for five minutes, and without a pause
    for what it waits for. Only who asks for the server's health is told 503.
    """

    def check_xsrf_cookie(self) -> None:
        """Nothing can be done here that another site could want done."""

    @allow_unauthenticated
    async def get(self, *_: str) -> None:
        health = self.request.path.endswith(("/healthz", "/readyz"))
        self._answer(
            "this server's tuft-jupyter configuration cannot be used: its panel and its log say why",
            503 if health else 400,
        )

    post = put = delete = get


def handlers(root: str, problem: str) -> list[tuple[str, type[web.RequestHandler], dict[str, Any]]]:
    return [
        (root + "/lab/state", Why, {"problem": problem}),
        (root + "/.*", Unusable, {"problem": problem}),
    ]
