"""What caches, proxies, terminals and log readers may be fooled with: over plain sockets and the real handlers."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.archives import adapter
from tests.support.http_server import BOB_KEY, ROOT, Server, filled, on_server
from tests.support.logs import messages
from tuft_jupyter.config import ConfigError, load_settings
from tuft_jupyter.wire.routes import ROUTES
from tuft_jupyter_server import logs

UPLOAD = "/tuft/adapters?base_model=tuft/demo&name=mine"


async def raw(port: int, data: bytes) -> bytes:
    """Everything that the server says to these bytes, until it closes or says nothing more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    said = b""
    try:
        async with asyncio.timeout(10):
            while chunk := await reader.read(65536):
                said += chunk
    except TimeoutError:
        pass
    writer.close()
    return said


def test_no_answer_may_be_kept_by_a_cache(tmp_path: Path) -> None:
    """T1: caches know `Authorization` for private; an answer to `X-API-Key` they would give to the next tenant."""

    async def body(server: Server) -> None:
        for route in ROUTES:
            for key in ("", BOB_KEY, None):
                path = filled(route.path, ticket="x", key="k") + (
                    "?wait=0" if route.endpoint == "feed" else ""
                )
                answer = await server.ask(route.method, path, key=key)
                assert answer.headers["Cache-Control"] == "no-store", (route.path, key)

    on_server(tmp_path, body, rps_limit=0)


SMUGGLED = b"DELETE " + ROOT.encode() + b"/auth/apikey/me HTTP/1.1\r\nHost: x\r\nX-API-Key: tml-bob\r\n\r\n"
AMBIGUOUS = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 900\r\n\r\n{}",
    "length and chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks unnamed": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "space before colon": b"Content-Length : 2\r\n\r\n{}",
    "a signed length": b"Content-Length: +2\r\n\r\n{}",
    "a hexadecimal length": b"Content-Length: 0x2\r\n\r\n{}",
    "a chunk that lies": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a folded header": b"X-A: b\r\n Content-Length: 2\r\n\r\n{}",
    "a null": b"X-A: \0\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", list(AMBIGUOUS))
def test_a_request_that_two_readers_could_read_differently_is_answered_at_most_once(
    tmp_path: Path, name: str
) -> None:
    """H1: what stands behind an ambiguous request is never taken for another one, whatever a proxy made of it."""

    async def body(server: Server) -> None:
        head = f"POST {ROOT}/create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.host.key}\r\n"
        said = await raw(server.port, head.encode() + AMBIGUOUS[name] + SMUGGLED)
        assert said.count(b"HTTP/1.1 ") <= 1, said
        assert not said or b" 400 " in said, said
        assert (await server.ask("GET", "/sessions", key=BOB_KEY)).code == 200, "the key was given up"

    on_server(tmp_path, body)


async def address(server: Server, host: str) -> str:
    """Where a download of one's own is said to be, asked under that name of the server."""
    (mine,) = json.loads((await server.ask("GET", "/checkpoints")).body)["checkpoints"]
    run, _, rest = mine["tinker_path"].removeprefix("tinker://").partition("/")
    path = f"/training_runs/{run}/checkpoints/{rest}/archive"
    answer = await server.ask("GET", path, headers={"Host": host})
    assert answer.code == 200, answer.body
    return str(json.loads(answer.body)["url"])


def test_where_downloads_are_is_the_operator_s_word_if_there_is_one(tmp_path: Path) -> None:
    """T5: a strange Host header is refused or changes only what its own sender is told; and never anything
    where `public_url` is set, which a server behind a proxy that ends TLS needs.
    """

    async def plain(server: Server) -> None:
        assert (await server.ask("POST", UPLOAD, adapter())).code == 200
        assert (await address(server, "evil.example.org")).startswith("http://evil.example.org/")
        assert (await address(server, "127.0.0.1:8888")).startswith("http://127.0.0.1:8888" + ROOT)
        for host in (b"a b", b"a/b", b"x\ty", b"evil@x,y", b"<i>"):
            asked = b"GET " + ROOT.encode() + b"/openapi.json HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
            assert b" 400 " in (await raw(server.port, asked)).split(b"\r\n")[0]

    async def configured(server: Server) -> None:
        url = await address(server, "evil.example.org")
        assert url.startswith("https://gpu.example.org/tuft/api/v1/tuft/files/")
        found = await server.ask("GET", urlsplit(url).path.removeprefix("/tuft/api/v1"), key=None)
        assert found.code == 200

    on_server(tmp_path, plain)
    on_server(tmp_path, configured, public_url="https://gpu.example.org/tuft/")


@pytest.mark.parametrize(
    "url", ["gpu.example.org", "ftp://x", "http://", "https://x/?a", "http://a b", "http://x\r\ny"]
)
def test_a_public_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="public_url"):
        load_settings(None, {"TUFT_HOME": str(tmp_path)}, {"public_url": url})


def test_the_log_of_requests_names_no_path_no_key_and_no_permission(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """T6: at DEBUG; the path of a download is its permission, and keys get typed into paths by mistake."""
    caplog.set_level(logging.DEBUG)

    async def body(server: Server) -> None:
        assert (await server.ask("POST", UPLOAD, adapter())).code == 200
        url = await address(server, "x")
        ticket = url.rpartition("/")[2]
        assert (await server.ask("GET", f"/tuft/files/{ticket}", key=None)).code == 200
        for path in (f"/{server.host.key}", f"/sessions/{server.host.key}", "/sessions/%0aERROR%20forged"):
            assert (await server.ask("GET", path)).code == 404
        ours = messages(caplog)
        assert "200 GET /tuft/files/{ticket}" in ours
        assert "404 GET /sessions/{session}" in ours
        assert "404 GET unknown path" in ours
        for secret in (ticket, server.host.key, "forged", "mine"):
            assert not [line for line in ours if secret in line]

    on_server(tmp_path, body)


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_that_is_logged_begins_a_line_of_its_own(form: str) -> None:
    """T6: line ends, terminal sequences and separators of other alphabets, in both forms of the log."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(logs.Named())
    handler.setFormatter(logs.Json() if form == "json" else logs.Lines())
    record: dict[str, Any] = {"name": "tuft_jupyter.x", "level": logging.ERROR, "pathname": "", "lineno": 0}
    for strange in ("\n2026 INFO root: forged", "\r\x1b[2K", "\u2028x", "\x9b31m", "\x85y"):
        said = logging.LogRecord(**record, msg="run %s failed", args=(strange,), exc_info=None)
        handler.handle(said)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert not [line for line in lines if not line.isprintable()]
    if form == "json":
        assert json.loads(lines[0])["message"] == "run \n2026 INFO root: forged failed"
