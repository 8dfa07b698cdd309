"""Every door of a real Jupyter server: without credentials, with stolen cookies, and what a refusal gives away."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import statistics
import time
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import websocket

from examples.run_on_server import Server
from tests.contract.conftest import clean_environment
from tests.support.http_server import BOB_KEY, on_server
from tests.support.http_server import Server as Host
from tests.support.live import listening
from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter.core.types import Principal
from tuft_jupyter.wire.endpoints.base import Call
from tuft_jupyter.wire.routes import ROUTES, Access
from tuft_jupyter_server import host as hosts
from tuft_jupyter_server import lab, lab_calls

pytestmark = pytest.mark.timeout(240)
OPEN = {route.path for route in ROUTES if route.access is Access.OPEN}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Jupyter with unauthenticated access off, as its own check of extensions wants it."""
    home = tmp_path_factory.mktemp("doors")
    root = home / "notebooks"
    root.mkdir()
    strict = ("--ServerApp.allow_unauthenticated_access=False",)
    with Server(root, home, base_url="/user/alice/", env=clean_environment(home), options=strict) as started:
        yield started


def knock(server: Server, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 0, timeout=30)
    body = b"{}" if method in ("POST", "PUT") else None
    connection.request(method, f"{where.path}{path.lstrip('/')}", body, headers or {})
    status = connection.getresponse().status
    connection.close()
    return status


def lab_paths(tmp_path: Path) -> list[str]:
    """The lab's routes as its handlers are registered, each with something in the place of its parts."""
    host = hosts.Host(load_settings(None, {"TUFT_HOME": str(tmp_path)}), engines=ScriptedEngines())
    patterns = [str(rule[0]) for rule in (*lab.handlers("/tuft", host), *lab_calls.handlers("/tuft", host))]
    return [re.sub(r"\((?:\?P<\w+>)?\[\^/\]\+\)", "x", pattern).rstrip("$") for pattern in patterns]


def test_no_handler_of_ours_answers_anybody_without_credentials(server: Server, tmp_path: Path) -> None:
    """T4: every route of the table and every one of the lab, each with every method; and Jupyter warns of none."""
    asked = 0
    for path in lab_paths(tmp_path):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert knock(server, method, path) in (401, 403, 405), (method, path)
            asked += 1
    for route in ROUTES:
        path = "tuft/api/v1" + re.sub(r"\{\w+\}", "x", route.path)
        expected = {200, 503} if route.path in OPEN else {401, 403}
        assert knock(server, route.method, path) in expected, route.path
        asked += 1
    assert asked > 80
    warnings = [line for line in server.log.read_text().splitlines() if "AuthWarning" in line]
    assert not [line for line in warnings if "tuft" in line]


def test_who_is_known_to_jupyter_but_denied_by_its_authorizer_gets_nothing(tmp_path: Path) -> None:
    """T4: resource `tuft`, at every route of the lab, with every method, at the socket, and before a byte of an upload
    is read.
    """
    root = tmp_path / "notebooks"
    root.mkdir()
    denying = ("--ServerApp.authorizer_class=tests.support.guarded.NoTuft",)
    with Server(
        root, tmp_path, base_url="/user/alice/", env=clean_environment(tmp_path), options=denying
    ) as server:
        known = {"Authorization": f"token {server.token}"}
        assert knock(server, "GET", "api/contents", known) == 200
        for path in lab_paths(tmp_path / "paths"):
            for method in ("GET", "POST", "PUT", "DELETE"):
                assert knock(server, method, path, known) in (403, 405), (method, path)
        address = server.url.replace("http", "ws", 1) + "tuft/lab/feed"
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            websocket.create_connection(
                address,
                header=[f"Authorization: token {server.token}"],
                timeout=20,
                http_no_proxy=["127.0.0.1"],
            )
        assert refused.value.status_code == 403
        assert _refused_unread(server, "tuft/lab/api/v1/tuft/adapters", known) == 403


def _refused_unread(server: Server, path: str, headers: dict[str, str]) -> int:
    """The answer to a large upload of which only the head was sent."""
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 0, timeout=30)
    connection.putrequest("POST", f"{where.path}{path}")
    for name, value in {**headers, "Content-Length": str(2**28)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("headers", [[], ["Cookie: username-127-0-0-1=alice"], ["X-API-Key: tml-wrong"]])
def test_the_feed_is_closed_to_who_has_no_credentials(server: Server, headers: list[str]) -> None:
    """T4: a websocket is checked as HTTP is (the fault of CVE-2024-28179)."""
    address = server.url.replace("http", "ws", 1) + "tuft/lab/feed"
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        websocket.create_connection(address, header=headers, timeout=20, http_no_proxy=["127.0.0.1"])
    assert refused.value.status_code in (401, 403)


def test_a_page_of_another_site_can_do_nothing_with_the_victim_s_cookies(
    server: Server, tmp_path: Path
) -> None:
    """T5: both families of routes, whatever the origin and the fetch mode."""
    cookie = _cookie(server)
    assert knock(server, "GET", "tuft/lab/state", {"Cookie": cookie}) == 200, "the victim is logged in"
    strange = [
        {},
        {"Origin": "https://trusted.example.com.evil.com"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Mode": "no-cors", "Content-Type": "text/plain"},
    ]
    for more in strange:
        for path in lab_paths(tmp_path):
            for method in ("POST", "PUT", "DELETE"):
                status = knock(server, method, path, {"Cookie": cookie, **more})
                assert status in (403, 404, 405), (method, path, more)
        for route in ROUTES:
            if route.access is Access.KEY:
                path = "tuft/api/v1" + re.sub(r"\{\w+\}", "x", route.path)
                assert knock(server, route.method, path, {"Cookie": cookie, **more}) == 401, route.path
    evil = {"Cookie": cookie, "Origin": "https://evil.example.com"}
    address = server.url.replace("http", "ws", 1) + "tuft/lab/feed"
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(
            address,
            header=[f"Cookie: {cookie}"],
            origin=evil["Origin"],
            timeout=20,
            http_no_proxy=["127.0.0.1"],
        )


def _cookie(server: Server) -> str:
    """What a browser has after its user logged in with the token."""
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 0, timeout=30)
    connection.request("GET", f"{where.path}api/status?token={server.token}")
    response = connection.getresponse()
    cookies: SimpleCookie = SimpleCookie()
    for line in response.headers.get_all("Set-Cookie") or ():
        cookies.load(line)
    connection.close()
    return "; ".join(f"{name}={morsel.value}" for name, morsel in cookies.items())


def test_ids_tell_nothing_of_each_other(tmp_path: Path) -> None:
    """T3: 128 random bits, none in a row."""

    async def body(server: Host) -> None:
        sessions = [(await server.post("/create_session", {}))["session_id"] for _ in range(50)]
        run = await server.new_run()
        steps = [
            await server.post(
                "/optim_step", {"model_id": run, "seq_id": n, "adam_params": {"learning_rate": 1e-4}}
            )
            for n in range(1, 51)
        ]
        requests = [step["request_id"] for step in steps]
        for names in (sessions, requests):
            numbers = sorted(int(name.replace("-", ""), 16) for name in names)
            gaps = [after - before for before, after in itertools.pairwise(numbers)]
            assert len(set(names)) == 50
            assert max(numbers) > 2**120
            assert min(gaps) > 2**96

    on_server(tmp_path, body)


def test_a_foreign_run_and_none_at_all_take_the_same_time(tmp_path: Path) -> None:
    """T3: 10,000 of each, turn by turn, without a network's noise around them."""

    async def body(server: Host) -> None:
        run = await server.new_run()
        route = next(each for each in ROUTES if each.endpoint == "get_info")
        bob = Principal("bob")
        missing = "0" * (len(run) - 1) + "1"
        calls = [Call(bob, body=json.dumps({"model_id": name}).encode()) for name in (run, missing)]
        times: list[list[float]] = [[], []]
        for _ in range(10_000):
            for taken, call in zip(times, calls, strict=True):
                began = time.perf_counter()
                answer = await server.host.api.answer(route, call)
                taken.append(time.perf_counter() - began)
                assert answer.status == 404
        foreign, none = (statistics.median(taken) for taken in times)
        spread = statistics.quantiles(times[1], n=4)
        assert abs(foreign - none) < max(spread[2] - spread[0], 0.1 * none)
        assert (await server.ask("POST", "/get_info", {"model_id": run}, BOB_KEY)).code == 404

    on_server(tmp_path, body)


def test_nothing_of_a_single_user_server_listens_beyond_the_machine(server: Server) -> None:
    """T11: neither our server nor any process below it; Ray's own sockets are looked at beside a worker."""
    ours = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    for process in ours:
        for at in listening(process):
            assert at.ip in ("127.0.0.1", "::1"), (process, at)
