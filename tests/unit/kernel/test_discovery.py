"""Where a kernel looks for its server, in which order, and what it takes for one."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.stub_server import KEY, StubServer
from tuft_jupyter import home as homes
from tuft_jupyter.kernel import discovery
from tuft_jupyter.kernel.discovery import check, discover, launch_arguments
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter_server.app import tell_kernels


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TUFT_HOME": str(tmp_path / "home"), "TUFT_API_KEY": KEY}


def test_an_address_wins_over_everything(server: StubServer, other: StubServer, env: dict[str, str]) -> None:
    """S0-20: address= is highest."""
    found = discover(server.address, None, env | {"TUFT_ADDRESS": other.address})
    assert found is not None
    assert (found.address, found.source) == (server.address, "address=")
    assert other.asked == []


def test_the_environment_wins_over_the_address_file(
    server: StubServer, other: StubServer, env: dict[str, str]
) -> None:
    """S0-21, S0-33: TUFT_ADDRESS beats file, scan and port."""
    homes.write_address(homes.home_dir(env), other.address)
    found = discover(None, None, env | {"TUFT_ADDRESS": server.address})
    assert found is not None
    assert (found.address, found.source) == (server.address, "TUFT_ADDRESS")


def test_the_address_file_is_found_and_a_stale_one_does_not_hang(
    server: StubServer, dead: str, env: dict[str, str]
) -> None:
    """S0-22: a healthy address is taken, a dead one is passed over in less than 3 s."""
    homes.write_address(homes.home_dir(env), server.address)
    found = discover(None, None, env)
    assert found is not None
    assert found.source == "address file"

    homes.write_address(homes.home_dir(env), dead)
    notes: list[str] = []
    began = time.monotonic()
    assert discover(None, None, env, note=notes.append) is None
    assert time.monotonic() - began < 3
    assert notes == [f"address file says {dead}, but no TuFT server answers there; looking further"]


def test_running_daemons_then_notebook_servers_are_asked(
    server: StubServer, other: StubServer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-23: the process scan comes before the default port."""
    monkeypatch.setattr(discovery, "notebook_servers", lambda _: iter([other.address]))
    found = discover(None, None, env)
    assert found is not None
    assert (found.address, found.source) == (other.address, "running Jupyter server")
    monkeypatch.setattr(discovery, "daemons", lambda: iter([server.address]))
    found = discover(None, None, env)
    assert found is not None
    assert (found.address, found.source) == (server.address, "running daemon")


def test_the_default_port_comes_last(
    server: StubServer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-24."""
    monkeypatch.setattr(discovery, "DEFAULT_PORT", server.port)
    found = discover(None, None, env)
    assert found is not None
    assert (found.address, found.source) == (server.address, "default port")


@pytest.mark.parametrize(
    "impostor",
    [
        {"GET /healthz": lambda _: (200, "<html>ok</html>")},
        {"GET /healthz": lambda _: (200, {"healthy": True})},
        {"GET /get_server_capabilities": lambda _: (404, {"detail": "?"})},
        {"GET /get_server_capabilities": lambda _: (200, {"status": "ok"})},
        {"GET /get_server_capabilities": lambda _: (200, "<html>ok</html>")},
    ],
)
def test_a_foreign_service_is_not_adopted(
    impostor: dict[str, object], server: StubServer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """M9, S0-25: what answers must be Tinker-shaped."""
    monkeypatch.setattr(discovery, "DEFAULT_PORT", server.port)
    server.routes |= impostor  # type: ignore[arg-type]
    assert discover(None, None, env) is None


def test_health_is_asked_without_a_key(server: StubServer) -> None:
    """P5: a key goes only to what already answered like a Tinker server."""
    check(server.address, KEY)
    assert server.asked == [("GET /healthz", None), ("GET /get_server_capabilities", KEY)]


def test_an_unhealthy_place_falls_through_to_the_next(
    server: StubServer, dead: str, env: dict[str, str]
) -> None:
    """S0-26: env dead, file healthy -> file, and it is said."""
    homes.write_address(homes.home_dir(env), server.address)
    notes: list[str] = []
    found = discover(None, None, env | {"TUFT_ADDRESS": dead}, note=notes.append)
    assert found is not None
    assert found.address == server.address
    assert notes == [f"TUFT_ADDRESS says {dead}, but no TuFT server answers there; looking further"]


def test_an_address_that_does_not_answer_is_an_error_and_nothing_else_is_tried(
    server: StubServer, dead: str, env: dict[str, str]
) -> None:
    """S0-17: explicit means no fallback; the error names the address."""
    with pytest.raises(TuftConnectionError, match=f"Cannot connect to TuFT at {dead}"):
        discover(dead, None, env | {"TUFT_ADDRESS": server.address})
    assert server.asked == []


def test_a_refused_key_says_what_to_pass(server: StubServer, env: dict[str, str]) -> None:
    with pytest.raises(TuftConnectionError, match=r"refuses this key .*api_key= or set TUFT_API_KEY"):
        discover(server.address, "tml-wrong", env)


def test_a_server_that_reads_its_journal_is_waited_for(server: StubServer, env: dict[str, str]) -> None:
    """S0-21: it is alive, and says 429 until it is ready; nothing is started beside it."""
    offered, tries = server.routes["GET /get_server_capabilities"], iter(range(2))
    not_yet = (429, {"detail": "not ready yet: reading the journal"})
    server.routes["GET /get_server_capabilities"] = lambda _: (
        not_yet if next(tries, None) is not None else offered({})
    )
    found = discover(None, None, env | {"TUFT_ADDRESS": server.address})
    assert found is not None
    assert found.source == "TUFT_ADDRESS"


@pytest.mark.parametrize(
    ("route", "status", "says"),
    [
        ("GET /healthz", 503, "cannot be used (no configuration)"),
        ("GET /get_server_capabilities", 307, "cannot be used now (no configuration)"),
    ],
)
def test_why_a_server_cannot_be_used_is_in_its_own_words(
    route: str, status: int, says: str, server: StubServer, env: dict[str, str]
) -> None:
    server.routes[route] = lambda _: (status, {"detail": "no configuration"})
    notes: list[str] = []
    assert discover(None, None, env | {"TUFT_ADDRESS": server.address}, note=notes.append) is None
    assert notes == [f"TUFT_ADDRESS says {server.address}, but the server there {says}; looking further"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_that_nobody_vouches_for_is_what_is_said(
    server: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of one's own often has one of one's own; the name in SSL_CERT_FILE mends it."""
    certificate = server.speak_tls(tmp_path)
    assert "certificate there is not trusted here" in str(check(server.address, KEY))
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert check(server.address, KEY) == ["tuft/demo"]


def test_a_base_url_of_the_user_s_own_is_respected(
    server: StubServer, other: StubServer, dead: str, env: dict[str, str]
) -> None:
    """S0-11: a preset TINKER_BASE_URL is where we connect; ``here`` overrides; dead is an error."""
    own = env | {"TINKER_BASE_URL": server.address, "TINKER_API_KEY": KEY, "TUFT_ADDRESS": other.address}
    found = discover(None, None, own)
    assert found is not None
    assert (found.address, found.source) == (server.address, "TINKER_BASE_URL")
    found = discover(None, None, own, here=True)
    assert found is not None
    assert found.address == other.address
    with pytest.raises(TuftConnectionError, match=r"from TINKER_BASE_URL.*--here"):
        discover(None, None, own | {"TINKER_BASE_URL": dead})


def test_what_the_notebook_server_injects_is_not_the_user_s_own(
    server: StubServer, env: dict[str, str]
) -> None:
    """S0-11: the extension's TINKER_BASE_URL equals TUFT_ADDRESS."""
    hosted = env | {"TUFT_ADDRESS": server.address, "TINKER_BASE_URL": server.address + "/"}
    found = discover(None, None, hosted)
    assert found is not None
    assert found.source == "TUFT_ADDRESS"


@pytest.mark.parametrize("own", ["TINKER_BASE_URL", "TUFT_ADDRESS"])
def test_a_notebook_server_overwrites_no_address_of_the_user_s_own(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-05, S0-11: what was set before the server started is what its kernels see; else they are told of it."""
    host = SimpleNamespace(key="tml-host")
    server = SimpleNamespace(local_url="http://127.0.0.1:8888/user/ada/", base_url="/user/ada/")
    before = os.environ.copy()
    try:
        os.environ[own] = "http://elsewhere"
        tell_kernels(host, server)  # type: ignore[arg-type]
        assert os.environ[own] == "http://elsewhere"
        assert "TINKER_API_KEY" not in os.environ
        del os.environ[own]
        tell_kernels(host, server)  # type: ignore[arg-type]
        told = "http://127.0.0.1:8888/user/ada/tuft"
        assert os.environ["TUFT_ADDRESS"] == os.environ["TINKER_BASE_URL"] == told
        assert discovery.user_base_url(os.environ) is None
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_running_notebook_servers_are_read_from_jupyter_s_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-23: the one that started this kernel first; one that has died, and a torn file, are passed over."""
    monkeypatch.undo()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    ours, parent = os.getpid(), os.getppid()
    for pid, url in ((ours, "http://a/"), (parent, "http://b/user/"), (2**22 + 1, "http://dead/")):
        (tmp_path / f"jpserver-{pid}.json").write_text(json.dumps({"pid": pid, "url": url}))
    (tmp_path / "jpserver-1.json").write_text("{")
    found = list(discovery.notebook_servers({"JPY_PARENT_PID": str(parent)}))
    assert found == ["http://b/user/tuft", "http://a/tuft"]


def test_each_place_is_asked_once(server: StubServer, env: dict[str, str]) -> None:
    homes.write_address(homes.home_dir(env), server.address)
    with pytest.raises(TuftConnectionError, match=r"from TUFT_ADDRESS\).*refuses this key.*set TUFT_API_KEY"):
        discover(None, None, env | {"TUFT_ADDRESS": server.address, "TUFT_API_KEY": "tml-wrong"})
    assert [route for route, _ in server.asked].count("GET /healthz") == 1


def test_the_generated_key_is_not_shown_to_another_user_s_process(
    server: StubServer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: on a shared machine anybody can listen on the default port, or where our last server was."""
    del env["TUFT_API_KEY"]
    server.key = homes.ensure_key(homes.home_dir(env))
    homes.write_address(homes.home_dir(env), server.address)
    monkeypatch.setattr(discovery, "DEFAULT_PORT", server.port)
    assert discover(None, None, env) is not None
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    server.asked.clear()
    assert discover(None, None, env) is None
    assert server.asked == []
    assert discover(None, server.key, env) is not None, "a key that was given goes where it is told to"
    homes.address_path(homes.home_dir(env)).unlink()
    monkeypatch.setattr(discovery, "DEFAULT_PORT", 1)
    monkeypatch.setattr(discovery, "notebook_servers", lambda _: iter([server.address]))
    assert discover(None, None, env) is None, "a server that died leaves its file, and its port, to others"


@pytest.mark.parametrize(
    ("command", "address"),
    [
        ("/v/bin/python /v/bin/tuft launch --config f.yaml", "http://127.0.0.1:10610"),
        ("/v/bin/python /v/bin/tuft launch --port 10777", "http://127.0.0.1:10777"),
        ("tuft launch -p 1 --host 0.0.0.0", "http://127.0.0.1:1"),
        ("tuft --port=8080 --model-config m.yaml", "http://127.0.0.1:8080"),
        ("python jupyter-tuft launch --host 10.0.0.5", "http://10.0.0.5:10610"),
        ("python /v/bin/jupyter tuft launch --port 5", "http://127.0.0.1:5"),
        ("python -m tuft_jupyter_server --config f.yaml", "http://127.0.0.1:10610"),
        ("python -m tuft_jupyter_server launch --port 7", "http://127.0.0.1:7"),
        ("python3.11 -X dev -u /v/bin/tuft launch --host ::1 --port 5", "http://[::1]:5"),
        ("tuft status", None),
        ("ssh tuft -L 8888:localhost:8888", None),
        ("ssh gpu tuft launch", None),
        ("docker run tuft -p 10610:10610", None),
        ("python train.py tuft --rank 8", None),
        ("vim tuft", None),
        ("python -m http.server", None),
        ("", None),
    ],
)
def test_our_daemons_are_known_by_their_command(
    command: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-23: every spelling of S0-02, and nothing else."""
    monkeypatch.setattr(discovery, "DEFAULT_PORT", 10610)
    arguments = launch_arguments(command.split())
    assert (None if arguments is None else discovery._address(arguments, {})) == address
