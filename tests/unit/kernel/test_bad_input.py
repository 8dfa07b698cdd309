"""What can be wrong, and the one sentence that says so: its cause, and the command that mends it.

The same sentences stand in a cell, in a script and on the command line, because they come from one place.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

import tuft_jupyter
from tests.support.stub_server import KEY, StubServer
from tests.unit.kernel.conftest import free_port
from tuft_jupyter import cli, home
from tuft_jupyter.kernel import connect, discovery
from tuft_jupyter.kernel.discovery import discover
from tuft_jupyter.kernel.errors import TuftConnectionError

SECONDS = 10.0
"""Nothing here hangs longer than it says: a few probes of two seconds."""


def sentence(**options: object) -> str:
    """What `init` says when it fails: one line, in time."""
    began = time.monotonic()
    with pytest.raises(TuftConnectionError) as failed:
        tuft_jupyter.init(report=lambda *_: None, **options)  # type: ignore[arg-type]
    assert time.monotonic() - began < SECONDS
    said = str(failed.value)
    assert "\n" not in said
    assert not connect.is_initialized()
    return said


@pytest.fixture
def found(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    return server


def test_a_wrong_address_is_named(dead: str) -> None:
    """S0-17."""
    assert f"Cannot connect to TuFT at {dead} (from address=): no TuFT server answers there" in sentence(
        address=dead
    )


def test_a_server_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-25: a port that is open and silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no TuFT server answers" in sentence(address=f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_wrong_key_and_a_missing_one_say_what_to_set(
    found: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-34."""
    assert "pass api_key= or set TUFT_API_KEY" in sentence(address=found.address, api_key="tml-wrong")


def test_a_key_that_the_sdk_refuses_is_said_before_it_does(server: StubServer) -> None:
    server.key = "secret"
    assert "begin with tml-" in sentence(address=server.address, api_key="secret")


def test_a_model_that_is_not_there_is_named_with_what_is_offered(found: StubServer) -> None:
    """S1-30: also where a server was found that serves others only."""
    found.routes["POST /tuft/models"] = lambda _: (
        400,
        {"detail": "no directory /no/such and no model of the hub"},
    )
    said = sentence(model="/no/such")
    assert "cannot serve /no/such: no directory /no/such" in said
    assert "It offers: tuft/demo" in said


def test_a_missing_backend_says_what_to_install_and_where(found: StubServer) -> None:
    text = 'no training backend is installed there: run pip install "tuft-jupyter[backend]" and restart the server'
    found.states["tuft/demo"] = {"state": "failed", "detail": text}
    assert text in sentence(model="tuft/demo")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-40."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("TUFT_PORT", str(port))
        assert f"Port {port} is in use" in sentence(model="tuft/demo")


def test_a_misspelt_key_of_a_configuration_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S1-34: the key, the file, and what was probably meant; in a cell as on the command line."""
    file = tmp_path / "f.yaml"
    file.write_text("supported_modles: [{model_name: tuft/demo}]\n")
    said = sentence(config=file)
    assert "supported_modles" in said
    assert "supported_models" in said
    assert cli.main(["launch", "--config", str(file)]) == 1
    assert "supported_models" in capsys.readouterr().err


def test_a_missing_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """S0-18, S0-35."""
    assert sentence(config="/no/such.yaml") == "Config file not found: /no/such.yaml"


def test_an_sdk_of_another_time_is_said_with_the_command(
    found: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-08: one that is too old to work is refused; one that is newer than was tried is used, and that is said."""
    notes: list[str] = []
    monkeypatch.setattr(connect, "sdk_version", lambda: "0.15.2")
    tuft_jupyter.init(report=lambda phase, text: notes.append(text))
    with pytest.raises(TuftConnectionError, match=r'tinker 0.15.2 .*pip install "tinker>=0.38,<0.39"'):
        tuft_jupyter.get_service_client()
    assert any("0.15.2" in note for note in notes)
    monkeypatch.setattr(connect, "sdk_version", lambda: "0.40.0")
    notes.clear()
    tuft_jupyter.init(report=lambda phase, text: notes.append(text))
    assert any("newer than" in note for note in notes)


def test_environments_that_differ_are_said(found: StubServer) -> None:
    notes: list[str] = []
    tuft_jupyter.init(report=lambda phase, text: notes.append(text))
    (note,) = [each for each in notes if "9.9" in each]
    assert tuft_jupyter.__version__ in note
    assert "pip install --upgrade tuft-jupyter" in note


def test_a_dead_server_is_said_by_every_command_of_the_terminal(
    dead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["status"], ["runs"], ["export"], ["keys", "list"]):
        assert cli.main([*command, "--address", dead]) == 1
        said = capsys.readouterr().err
        assert f"tuft: Cannot connect to TuFT at {dead}" in said
        assert len(said.strip().splitlines()) == 1


def test_the_places_are_tried_in_their_order(
    server: StubServer, other: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-12: each place answers, and the highest wins; taking it away, the next one does.

    Environment variable, address file, process scan, default port.
    """
    env = {"TUFT_HOME": str(home.home_dir()), "TUFT_API_KEY": KEY, "TUFT_ADDRESS": server.address}
    home.write_address(home.home_dir(env), other.address)
    third = f"http://localhost:{server.port}"
    monkeypatch.setattr(discovery, "daemons", lambda: iter([third]))
    monkeypatch.setattr(discovery, "DEFAULT_PORT", other.port)
    order = []
    for take_away in (
        lambda: env.pop("TUFT_ADDRESS"),
        lambda: home.remove_address(home.home_dir(env), other.address),
        lambda: monkeypatch.setattr(discovery, "daemons", lambda: iter(())),
        lambda: monkeypatch.setattr(discovery, "DEFAULT_PORT", free_port()),
    ):
        place = discover(None, None, env)
        assert place is not None
        order.append(place.source)
        take_away()
    assert order == ["TUFT_ADDRESS", "address file", "running daemon", "default port"]
    assert discover(None, None, env) is None
