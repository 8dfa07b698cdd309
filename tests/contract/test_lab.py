"""What the panel calls: the route table under Jupyter's identity, on a real notebook server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest
import tinker
import websocket

from examples.run_on_server import Server
from tests.support.live import environment, sdk

PREFIX = "tuft/lab/api/v1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("root")
    home = tmp_path_factory.mktemp("home")
    with Server(root, home, base_url="/user/alice/", env=environment(home, LOGNAME="alice")) as running:
        yield running


def plain(
    server: Server, method: str, path: str, headers: dict[str, str], body: Any = None
) -> tuple[int, HTTPMessage, bytes]:
    """One request as it is; nothing is added to its headers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data=data, headers=headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_what_a_key_may_do_the_owner_may_do_from_the_lab(server: Server) -> None:
    opened = server.request("POST", f"{PREFIX}/create_session", {"tags": [], "sdk_version": "0.38.0"})
    assert server.request("GET", f"{PREFIX}/sessions")["sessions"] == [opened["session_id"]]


def test_a_stranger_gets_nothing_and_changes_nothing(server: Server) -> None:
    before = server.request("GET", "tuft/lab/state")
    for method, path in (
        ("GET", "sessions"),
        ("POST", "create_session"),
        ("DELETE", "training_runs/r/checkpoints/weights/n"),
    ):
        status, _, _ = plain(server, method, f"{PREFIX}/{path}", {"Content-Type": "application/json"}, {})
        assert status == 403, path
    key = {"X-API-Key": "tml-wrong"}
    assert plain(server, "GET", f"{PREFIX}/sessions", key)[0] == 403
    assert server.request("GET", "tuft/lab/state")["state"] == before["state"]


def test_another_site_cannot_use_the_cookie_of_a_signed_in_page(server: Server) -> None:
    """T1: the cookie alone changes nothing: the XSRF token is asked for, and foreign origins are refused."""
    status, headers, _ = plain(server, "GET", f"tuft/lab/state?token={server.token}", {})
    assert status == 200
    cookie = "; ".join(value.split(";")[0] for value in headers.get_all("Set-Cookie") or ())
    assert cookie
    signed_in = {"Cookie": cookie, "Content-Type": "application/json"}
    assert plain(server, "POST", f"{PREFIX}/create_session", signed_in, {"tags": []})[0] == 403
    foreign = {**signed_in, "Origin": "https://evil.example"}
    assert plain(server, "GET", f"{PREFIX}/sessions", foreign)[0] in (403, 404)


def test_a_refusal_says_why_and_no_page_can_run_in_an_answer(server: Server) -> None:
    """T10: answers of lab routes are sandboxed JSON."""
    authorized = {"Authorization": f"token {server.token}", "Content-Type": "application/json"}
    path = f"{PREFIX}/training_runs/<img onerror=alert(1)>/checkpoints/weights/n".replace(" ", "%20")
    status, headers, body = plain(server, "DELETE", path.replace("<", "%3C").replace(">", "%3E"), authorized)
    assert status == 404
    assert "does not exist" in json.loads(body)["detail"]
    assert headers["Content-Type"].startswith("application/json")
    assert "sandbox" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["auth/token", "auth/apikey/me", "healthz"])
def test_routes_about_a_key_are_not_for_the_lab(server: Server, path: str) -> None:
    authorized = {"Authorization": f"token {server.token}", "Content-Type": "application/json"}
    assert plain(server, "GET", f"{PREFIX}/{path}", authorized)[0] == 404


def test_the_panel_hears_of_the_machine_and_of_the_log(server: Server) -> None:
    """S1-69: what the machine does each second, and the newest lines of the log."""
    address = f"{server.url.replace('http', 'ws', 1)}tuft/lab/feed?since=0"
    socket = websocket.create_connection(address, header=[f"Authorization: token {server.token}"], timeout=20)
    heard: dict[str, Any] = {}
    logged: list[str] = []
    while not ({"status", "gauges"} <= set(heard) and any("journal" in line for line in logged)):
        message = json.loads(socket.recv())
        heard[message["type"]] = message
        logged += [line["text"] for line in message.get("lines", ())]
    socket.close()
    assert {"name", "pid", "cpu", "memory", "gpu_memory"} == set(heard["gauges"]["workers"][0])
    for gpu in heard["gauges"]["gpus"]:
        assert 0 <= gpu["used"] <= gpu["total"]
    known = server.request("GET", "tuft/lab/state")["status"]
    assert heard["status"]["status"]["started"] == known["started"], (
        "else the panel would fetch the state again"
    )


def test_a_configuration_that_cannot_be_used_is_named_and_jupyter_starts(tmp_path: Path) -> None:
    """S1-22: the notebook server runs and the panel is told the sentence; a client hears only that there is one."""
    config = tmp_path / "tuft.yaml"
    config.write_text("suported_models:\n  - model_name: tuft/demo\n")
    env = environment(tmp_path, TUFT_CONFIG=str(config))
    with Server(tmp_path, tmp_path, env=env) as server:
        assert server.request("GET", "api/status")["kernels"] == 0
        authorized = {"Authorization": f"token {server.token}"}
        status, _, body = plain(server, "GET", "tuft/lab/state", authorized)
        assert status == 503
        problem = json.loads(body)["problem"]
        assert "suported_models" in problem
        assert "supported_models" in problem
        assert plain(server, "GET", "tuft/lab/state", {})[0] == 403
        status, _, body = plain(server, "POST", "tuft/api/v1/create_session", {}, {})
        assert status == 400
        assert "suported" not in body.decode()
        assert plain(server, "GET", "tuft/api/v1/healthz", {})[0] == 503
        with (
            sdk(f"{server.url}tuft", "tml-any") as service,
            pytest.raises(tinker.BadRequestError, match="configuration cannot be used"),
        ):
            service.create_lora_training_client("tuft/demo")
