"""The session on a training server: what an answer is taken for, and how often one is asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.engine.remote.http import Reply, Server
from tuft_jupyter.engine.remote.tinker_client import KIND, TinkerClient

Answer = tuple[int, str, bytes]


@contextmanager
def answering(*answers: Answer) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these answers in turn, the last one again and again; its address, and when it was asked."""
    asked: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, media, text = answers[min(len(asked), len(answers) - 1)]
            asked.append(time.monotonic())
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def kept(url: str) -> Reply:
    """What a promise is kept with there."""

    async def ask() -> Reply:
        server = Server(KIND, url)
        try:
            return await asyncio.wait_for(TinkerClient(server).answer({"request_id": "r"}), 20)
        finally:
            await server.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "page", [(200, "text/html", b"<html>back soon</html>"), (200, JSON, b"[]"), (200, JSON, b'"\xff"')]
)
def test_what_is_no_answer_of_the_protocol_is_not_handed_to_the_client(page: Answer) -> None:
    """S4-30: whether the op was applied is not known, so the run is made anew from what is."""
    with answering(page) as (url, _), pytest.raises(EngineDied, match="in a form that is not known"):
        kept(url)


def test_a_promise_is_kept_with_a_message_or_a_value() -> None:
    with answering((200, PROTOBUF, b"")) as (url, _):
        assert kept(url).content_type == PROTOBUF
    with answering((200, JSON, b'{"metrics": {}}')) as (url, _):
        assert kept(url).json() == {"metrics": {}}
    with answering((200, JSON, b'{"error": "no", "category": "user"}')) as (url, _), pytest.raises(UserError):
        kept(url)


@pytest.mark.parametrize("not_yet", [(408, JSON, b"{}"), (200, JSON, b'{"type": "try_again"}')])
def test_a_server_that_holds_no_poll_is_not_asked_without_end(not_yet: Answer) -> None:
    """The notebook server's own loop does the asking."""
    with answering(*[not_yet] * 4, (200, JSON, b"{}")) as (url, asked):
        kept(url)
        assert len(asked) == 5
        assert asked[-1] - asked[0] > 0.3
