"""The panel of a user's own server where a shared service does the work: it shows what the user does there."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import websocket

from examples.run_on_server import Server
from tests.support.archives import adapter
from tests.support.live import ask, environment, until
from tests.support.stub_server import StubServer

CAROL, BOB = "carol-s-token", "bob-s-token"
PREFIX = "tuft/lab/api/v1"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that knows both, as a Hub's service would."""
    with shared(tmp_path_factory.mktemp("service")) as running:
        yield f"{running.url}tuft"


def shared(work: Path) -> Server:
    config = work / "tuft.yaml"
    keys = {f"tml-{CAROL}": "carol", f"tml-{BOB}": "bob"}
    config.write_text(
        json.dumps({"supported_models": [{"model_name": "tuft/demo"}], "authorized_users": keys})
    )
    return Server(work, work, env=environment(work, TUFT_CONFIG=str(config)))


def own_server(work: Path, service: str) -> Server:
    env = environment(work, TUFT_HUB_SERVICE=service, JUPYTERHUB_API_TOKEN=CAROL)
    return Server(work, work, base_url="/user/carol/", env=env)


@pytest.fixture(scope="module")
def carol(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with own_server(tmp_path_factory.mktemp("carol"), service) as running:
        yield running


def open_session(service: str, token: str) -> str:
    made = ask(service, "create_session", f"tml-{token}", {"tags": [], "sdk_version": "0.38.0"})
    return str(made["session_id"])


def plain(
    server: Server, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> tuple[int, Any, bytes]:
    headers = {"Authorization": f"token {server.token}", "Content-Type": kind}
    request = urllib.request.Request(f"{server.url}{path}", data=body, headers=headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_panel_shows_what_its_user_does_at_the_service(service: str, carol: Server) -> None:
    """S0-10, P2: nobody else's things are in it."""
    mine, other = open_session(service, CAROL), open_session(service, BOB)
    shown = carol.request("GET", "tuft/lab/state")
    assert shown["status"]["tenant"] == "carol"
    sessions = [session["id"] for session in shown["state"]["sessions"]]
    assert mine in sessions
    assert other not in sessions


def test_the_panel_hears_at_once_what_happens_there(service: str, carol: Server) -> None:
    """S0-10, P2: records and gauges come over; another tenant's records and the service's log do not."""
    known = carol.request("GET", "tuft/lab/state")["state"]["n"]
    address = f"{carol.url.replace('http', 'ws', 1)}tuft/lab/feed?since={known}"
    socket = websocket.create_connection(address, header=[f"Authorization: token {carol.token}"], timeout=30)
    heard: dict[str, list[Any]] = {}

    def hear(*kinds: str) -> None:
        while not set(kinds) <= set(heard):
            message = json.loads(socket.recv())
            heard.setdefault(message["type"], []).append(message)

    hear("status", "gauges")
    other, mine = open_session(service, BOB), open_session(service, CAROL)
    hear("records")
    socket.close()
    records = [record for message in heard["records"] for record in message["records"]]
    assert {record["tenant"] for record in records} == {"carol"}
    assert mine in json.dumps(records)
    assert other not in json.dumps(heard)
    assert "log" not in heard


def test_no_proxy_is_to_hold_back_what_comes_bit_by_bit(carol: Server) -> None:
    """nginx before a Hub gathers an answer until it has ended, unless it is told not to."""
    status, headers, body = plain(carol, "GET", f"{PREFIX}/tuft/feed?wait=1")
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    assert body.startswith(b"data: {")
    assert (headers["X-Accel-Buffering"], headers["Cache-Control"]) == ("no", "no-store")


def test_a_panel_that_is_closed_is_not_listened_for_any_longer(service: str, carol: Server) -> None:
    """L7: no connection to the service stays."""

    def connected() -> bool:
        there = urlsplit(service).port
        connections = psutil.Process(carol.pid).net_connections("tcp")
        return any(each.raddr and each.raddr.port == there for each in connections)

    until(lambda: not connected(), 30, "the panels of other tests are listened for")
    address = f"{carol.url.replace('http', 'ws', 1)}tuft/lab/feed"
    socket = websocket.create_connection(address, header=[f"Authorization: token {carol.token}"], timeout=30)
    assert json.loads(socket.recv())["type"] == "status"
    assert connected()
    socket.close()
    until(lambda: not connected(), 30, "the service is listened to still")


def test_what_the_panel_asks_for_is_done_at_the_service(service: str, carol: Server) -> None:
    """An adapter dropped into the panel is kept there, found there, and deleted there."""
    path = f"{PREFIX}/tuft/adapters?base_model=tuft/demo&name=brought"
    status, _, body = plain(carol, "POST", path, adapter(), "application/x-tar")
    assert status == 200, body
    kept = json.loads(body)["tinker_path"]
    listed = ask(service, "checkpoints", f"tml-{CAROL}")["checkpoints"]
    assert kept in [each["tinker_path"] for each in listed]
    run, _, name = kept.removeprefix("tinker://").partition("/")
    status, _, body = plain(carol, "DELETE", f"{PREFIX}/training_runs/{run}/checkpoints/{name}")
    assert status in (200, 204), body
    listed = ask(service, "checkpoints", f"tml-{CAROL}")["checkpoints"]
    assert kept not in [each["tinker_path"] for each in listed]


def test_what_is_downloaded_in_the_panel_comes_from_the_service(carol: Server) -> None:
    """Its address was signed there: the user's own server, which the browser sees, knows nothing of it."""
    path = f"{PREFIX}/tuft/adapters?base_model=tuft/demo&name=taken"
    _, _, body = plain(carol, "POST", path, adapter(), "application/x-tar")
    run, _, name = json.loads(body)["tinker_path"].removeprefix("tinker://").partition("/")
    _, _, body = plain(carol, "GET", f"{PREFIX}/training_runs/{run}/checkpoints/{name}/archive")
    ticket = json.loads(body)["url"].rpartition("/")[2]
    status, headers, body = plain(carol, "GET", f"{PREFIX}/tuft/files/{ticket}")
    assert (status, headers["Content-Disposition"]) == (200, 'attachment; filename="taken.tar"')
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        assert "adapter_model.safetensors" in archive.getnames()
    assert plain(carol, "GET", f"{PREFIX}/tuft/files/{ticket[:-4]}")[0] == 403


class Endless(BaseHTTPRequestHandler):
    """A service that has a file of three gigabytes."""

    sent = 0
    broken = False

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(3 * 2**30))
        self.end_headers()
        try:
            for _ in range(3 * 2**10):
                self.wfile.write(bytes(2**20))
                type(self).sent += 2**20
        except OSError:
            type(self).broken = True

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_that_is_read_slowly_is_not_held_in_memory_and_ends_with_its_reader(
    tmp_path: Path,
) -> None:
    """L7: the service is read no faster than the browser takes it, whatever the file's size, and not for nobody."""
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    with own_server(tmp_path, f"http://127.0.0.1:{elsewhere.server_port}") as server:
        before = psutil.Process(server.pid).memory_info().rss
        request = urllib.request.Request(
            f"{server.url}{PREFIX}/tuft/files/ticket", headers={"Authorization": f"token {server.token}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            assert len(answer.read(2**20)) == 2**20
            seen = -1
            while seen != Endless.sent:
                seen = Endless.sent
                time.sleep(0.5)
            assert seen < 50 * 2**20
            assert psutil.Process(server.pid).memory_info().rss - before < 100e6
            assert len(answer.read(2**27)) == 2**27, "it goes on when it is read on"
        until(lambda: Endless.broken, 20, "the browser has left, and the service is read on")
        assert Endless.sent < 2**29
        until(lambda: server.request("GET", "api/status") is not None, 10, "the server is held up")
    elsewhere.shutdown()


def test_a_refusal_is_the_service_s_own_and_no_page_can_run_in_it(carol: Server) -> None:
    """T10."""
    status, headers, body = plain(carol, "GET", f"{PREFIX}/tuft/runs/none/curve")
    assert status == 404
    assert "does not exist" in json.loads(body)["detail"]
    assert headers["Content-Type"].startswith("application/json")
    assert "sandbox" in headers["Content-Security-Policy"]
    assert plain(carol, "GET", "tuft/lab/export?run=none")[0] == 404


@pytest.mark.parametrize("path", ["auth/token", "auth/apikey/me", "nothing"])
def test_no_credential_reaches_the_browser(carol: Server, path: str) -> None:
    """P5: routes about a key are not for the lab, and no answer names the token."""
    for method in ("GET", "POST", "DELETE"):
        assert plain(carol, method, f"{PREFIX}/{path}", b"{}" if method == "POST" else None)[0] == 404
    _, headers, body = plain(carol, "GET", "tuft/lab/state")
    assert CAROL not in f"{headers}{body.decode()}"


@pytest.mark.parametrize("path", ["tuft/lab/state", f"{PREFIX}/sessions", "tuft/lab/export?run=x"])
def test_who_is_not_logged_in_is_passed_on_nowhere(carol: Server, path: str) -> None:
    """T4."""
    request = urllib.request.Request(f"{carol.url}{path}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
    assert refused.value.code == 403


def test_a_service_that_is_away_is_named_and_the_notebook_server_runs(tmp_path: Path) -> None:
    with own_server(tmp_path, "http://127.0.0.1:9/services/tuft") as server:
        status, _, body = plain(server, "GET", "tuft/lab/state")
        assert status == 502, "503 says that this server is not set up"
        assert "http://127.0.0.1:9/services/tuft cannot be reached" in json.loads(body)["problem"]
        assert server.request("GET", "api/status")["kernels"] == 0


def test_a_service_that_is_not_ready_is_what_the_panel_shows(tmp_path: Path) -> None:
    """Not that the notebook server is to be started: the Hub's proxy answers 503 for a service that is down."""
    with StubServer(key=f"tml-{CAROL}") as there, own_server(tmp_path, there.address) as server:
        for answer, said in (
            ((503, "<html>Service Unavailable</html>"), "it answers 503: Service Unavailable"),
            (
                (404, "<html>Jupyter has lots of moons, but this is not one</html>"),
                "it answers 404: Not Found",
            ),
            ((429, {"detail": "not ready yet: 50% of the journal"}), "not ready yet: 50% of the journal"),
        ):
            there.routes["GET /tuft/state"] = lambda _, answer=answer: answer
            status, headers, body = plain(server, "GET", "tuft/lab/state")
            assert (status, headers["Content-Type"]) == (502, "application/json")
            assert json.loads(body)["problem"].endswith(said)


def test_a_feed_ends_with_the_service_so_that_the_panel_asks_anew(tmp_path: Path) -> None:
    """The state of a service that was started again is fetched whole."""
    (tmp_path / "own").mkdir()
    with shared(tmp_path) as there, own_server(tmp_path / "own", f"{there.url}tuft") as server:
        address = f"{server.url.replace('http', 'ws', 1)}tuft/lab/feed"
        socket = websocket.create_connection(
            address, header=[f"Authorization: token {server.token}"], timeout=30
        )
        assert json.loads(socket.recv())["type"] == "status"
        there.kill()
        closed: list[bool] = []

        def ended() -> bool:
            try:
                closed.append(socket.recv() == "")
            except (websocket.WebSocketException, ConnectionError):
                closed.append(True)
            return closed[-1]

        until(ended, 30, "the panel's socket is closed")
