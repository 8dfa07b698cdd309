"""What can be wrong, and the one sentence that says so: its cause, and the command that mends it.

Each situation is looked at from a cell, from a script and from the terminal: the same words, in time. What the panel
says of them is held by labextension/src/__tests__/connection.spec.tsx.
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

import tuft_jupyter
from tests.support.live import ROOT, environment
from tests.support.stub_server import KEY, StubServer
from tests.unit.kernel.conftest import free_port
from tuft_jupyter import cli, home
from tuft_jupyter.kernel import connect, discovery, doctor
from tuft_jupyter.kernel.discovery import discover
from tuft_jupyter.kernel.errors import TuftConnectionError

SECONDS = 10.0
"""Nothing here hangs longer than it says: a few probes of two seconds."""


@dataclass
class World:
    """What a situation is made in: a server that is found, and a place that nobody answers at."""

    server: StubServer
    dead: str
    tmp: Path
    set: Callable[[str, str], None]
    patch: Callable[..., None]
    closing: list[socket.socket] = field(default_factory=list)

    def listening(self) -> int:
        """A port on which something listens that never answers."""
        silent = socket.create_server(("127.0.0.1", 0))
        self.closing.append(silent)
        return int(silent.getsockname()[1])

    def file(self, text: str) -> str:
        path = self.tmp / "f.yaml"
        path.write_text(text)
        return str(path)


@dataclass
class Asked:
    """What is typed, and what every surface must say. ``cell`` lines are %tuft's; empty where there is no such way."""

    says: tuple[str, ...]
    cell: str = ""
    script: dict[str, str] | None = None
    terminal: tuple[str, ...] = ()
    fails: bool = True


def wrong_address(world: World) -> Asked:
    """S0-17"""
    says = (f"Cannot connect to TuFT at {world.dead}", "no TuFT server answers", "`tuft launch`")
    at = ("--address", world.dead)
    return Asked(says, f"init --address {world.dead}", {"address": world.dead}, ("runs", *at))


def silent_server(world: World) -> Asked:
    """S0-25: it accepts, and says nothing."""
    place = f"http://127.0.0.1:{world.listening()}"
    says = (f"Cannot connect to TuFT at {place}", "no TuFT server answers", "`tuft launch`")
    return Asked(says, f"init --address {place}", {"address": place}, ("status", "--address", place))


def wrong_key(world: World) -> Asked:
    """S0-34"""
    world.set("TUFT_API_KEY", "tml-wrong")
    at = world.server.address
    says = ("refuses this key", "set TUFT_API_KEY to a key of that server")
    return Asked(says, f"init --address {at}", {"address": at}, ("keys", "list", "--address", at))


def wrong_key_for_what_is_found(world: World) -> Asked:
    """S0-34: that a server runs is not passed over in silence, and none is started beside it."""
    world.set("TUFT_API_KEY", "tml-wrong")
    says = (world.server.address, "refuses this key", "set TUFT_API_KEY to a key of that server")
    return Asked(says, "init tuft/demo", {"model": "tuft/demo"}, ("runs",))


def missing_key(world: World) -> Asked:
    """S0-34: nothing is set, so that the user's own is tried."""
    world.set("TUFT_API_KEY", "")
    at = world.server.address
    says = ("refuses this key", "set TUFT_API_KEY to a key of that server")
    return Asked(says, f"init --address {at}", {"address": at}, ("export", "--address", at))


def key_the_sdk_refuses(world: World) -> Asked:
    """X2: the server would take it."""
    world.server.key = "secret"
    world.set("TUFT_API_KEY", "secret")
    return Asked(("takes only keys that begin with tml-", "authorized_users"), "init", {})


def no_such_model(world: World) -> Asked:
    """S1-30: the server that is found says so; a daemon ends with the same words."""
    refused = (400, {"detail": "there is no such directory on the server; give 'tuft/demo'"})
    world.server.routes["POST /tuft/models"] = lambda _: refused
    file = world.file("supported_models: [{model_name: a, model_path: /no/such}]\n")
    says = ("/no/such", "there is no such directory", "tuft/demo")
    return Asked(says, "init /no/such", {"model": "/no/such"}, ("launch", "--config", file, "--port", "0"))


def no_such_model_to_start_with(world: World) -> Asked:
    """S0-49: where there is no server, none is started in vain."""
    world.set("TUFT_ADDRESS", "")
    return Asked(("no directory /no/such", "`%tuft init tuft/demo`"), "init /no/such", {"model": "/no/such"})


def port_in_use(world: World) -> Asked:
    """S0-40"""
    world.set("TUFT_ADDRESS", "")
    port = str(world.listening())
    world.set("TUFT_PORT", port)
    file = world.file("supported_models: [{model_name: tuft/demo}]\n")
    terminal = ("launch", "--config", file)
    return Asked((port, "in use"), "init tuft/demo", {"model": "tuft/demo"}, terminal)


def misspelt_key(world: World) -> Asked:
    """S1-34: the file, the key, and what was probably meant, before anything starts."""
    world.set("TUFT_ADDRESS", "")
    file = world.file("supported_modles: [{model_name: tuft/demo}]\n")
    says = (file, "unknown key 'supported_modles'", "did you mean 'supported_models'?")
    return Asked(says, f"init --config {file}", {"config": file}, ("launch", "--config", file))


def missing_configuration(world: World) -> Asked:
    """S0-18, S0-35"""
    says = ("Config file not found: /no/such.yaml", "tuft/demo")
    terminal = ("launch", "--config", "/no/such.yaml")
    return Asked(says, "init --config /no/such.yaml", {"config": "/no/such.yaml"}, terminal)


def a_run_of_somebody_else(world: World) -> Asked:
    """S1-34: what is not yours is not there."""
    shown = {"version": "v", "runs": [], "checkpoints": []}
    world.server.routes["GET /tuft/outlook"] = lambda _: (200, shown)
    says = ("no run of yours", "tuft_jupyter.create_training_client(rank=8).result() starts one")
    return Asked(says, "resume 6f1c2a52:0", None, ("export", "6f1c2a52:0"))


def loading(world: World) -> Asked:
    """It is no failure: what is waited for is said, and where it ends."""
    told = {"state": "loading", "detail": "loading tuft/demo: starting Ray"}
    world.server.states["tuft/demo"] = told
    world.server.ready, world.server.waiting = False, "tuft/demo: loading tuft/demo: starting Ray"
    tuft_jupyter.init(report=lambda *_: None)
    return Asked(
        ("waiting for tuft/demo: loading tuft/demo: starting Ray",), "status", None, ("status",), False
    )


def sdk_too_old(world: World) -> Asked:
    """S1-08: it cannot work."""
    world.patch(connect, "sdk_version", lambda: "0.15.2")
    world.patch(
        doctor, "ASK", doctor.ASK.replace("version(name) for", "{'tinker': '0.15.2'}.get(name, '0.1') for")
    )
    return Asked(
        ("tinker 0.15.2 is too old", '%pip install "tinker>=0.38,<0.39"'), "init", {}, ("doctor",), False
    )


def sdk_too_new(world: World) -> Asked:
    """S1-08: it may work, so it is used, and that is said."""
    world.patch(connect, "sdk_version", lambda: "0.40.0")
    world.patch(
        doctor, "ASK", doctor.ASK.replace("version(name) for", "{'tinker': '0.40.0'}.get(name, '0.1') for")
    )
    says = ("tinker 0.40.0 is newer than any", '%pip install "tinker>=0.38,<0.39"')
    return Asked(says, "init", {}, ("doctor",), False)


def no_backend(world: World) -> Asked:
    """S1-04: in the environment of the server, which need not be this one."""
    text = 'no training backend is installed there: run pip install "tuft-jupyter[backend]" and restart the server'
    world.server.backend = {"installed": False, "detail": text}
    world.server.states["tuft/demo"] = {"state": "failed", "detail": text}
    return Asked((text,), "init tuft/demo", {"model": "tuft/demo"}, ("status",))


def environments_that_differ(world: World) -> Asked:
    world.server.version = "9.9"
    says = (
        "the server runs tuft-jupyter 9.9",
        tuft_jupyter.__version__,
        "pip install --upgrade tuft-jupyter",
    )
    return Asked(says, "init", {}, ("status",), False)


def nothing_runs(world: World) -> Asked:
    """S0-32"""
    world.set("TUFT_ADDRESS", "")
    world.server.routes.clear()
    return Asked(("o TuFT server", "tuft"), "init", {}, ())


SITUATIONS = (
    wrong_address, silent_server, wrong_key, wrong_key_for_what_is_found, missing_key, key_the_sdk_refuses,
    no_such_model, no_such_model_to_start_with, port_in_use, misspelt_key, missing_configuration,
    a_run_of_somebody_else, loading, sdk_too_old, sdk_too_new, no_backend, environments_that_differ, nothing_runs,
)  # fmt: skip
NOT_MET: dict[Callable[[World], Asked], tuple[str, ...]] = {
    key_the_sdk_refuses: ("terminal",),  # it has no SDK
    no_such_model_to_start_with: ("terminal",),  # `tuft launch` is no_such_model
    a_run_of_somebody_else: ("script",),
    loading: ("script",),  # init waits, and tells what for
    nothing_runs: ("terminal",),  # test_cli_runs.py
}


@pytest.fixture
def world(server: StubServer, dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    server.version = tuft_jupyter.__version__
    made = World(server, dead, tmp_path, monkeypatch.setenv, monkeypatch.setattr)
    yield made
    for each in made.closing:
        each.close()


def in_a_cell(line: str) -> tuple[bool, str]:
    """Whether it succeeded, and what it showed."""
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "tuft_jupyter")
    out = io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            result = shell.run_cell(f"%tuft {line}")
    finally:
        InteractiveShell.clear_instance()
    shown = repr(result.result) if result.success and result.result is not None else ""
    lines = [line for line in f"{out.getvalue()}\n{shown}".splitlines() if line.strip("' ")]
    return bool(result.success), "\n".join(lines)


def in_a_script(options: dict[str, str]) -> tuple[bool, str]:
    told: list[str] = []
    try:
        tuft_jupyter.init(report=lambda phase, text: told.append(text), **options)  # type: ignore[arg-type]
    except TuftConnectionError as error:
        return False, str(error)
    return True, "\n".join(told)


def in_a_terminal(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    """A server is launched in a process of its own; a look at one is not."""
    if words[0] == "launch":
        import os

        env = {**os.environ, "PYTHONPATH": environment(Path())["PYTHONPATH"]}
        command = [sys.executable, "-m", "tuft_jupyter_server", *words]
        done = subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode == 0, done.stderr.strip()
    code = cli.main(words)
    said = capsys.readouterr()
    return code == 0, (said.out + said.err).strip()


@pytest.mark.parametrize(
    ("situation", "surface"),
    [
        pytest.param(situation, surface, id=f"{situation.__name__}-{surface}")
        for situation in SITUATIONS
        for surface in ("cell", "script", "terminal")
        if surface not in NOT_MET.get(situation, ())
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_with_what_mends_it(
    situation: Callable[[World], Asked], surface: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """S0-12, S0-17, S0-18, S0-32, S0-34, S0-35, S0-40, S0-49, S1-08: in a cell, in a script, in a terminal."""
    asked = situation(world)
    typed = getattr(asked, surface)
    began = time.monotonic()
    if surface == "cell":
        well, said = in_a_cell(typed)
    elif surface == "script":
        well, said = in_a_script(typed)
    else:
        well, said = in_a_terminal(typed, capsys)
    assert time.monotonic() - began < SECONDS
    for part in asked.says:
        assert part in said, said
    assert "Traceback" not in said
    if asked.fails and typed != ("status",):
        assert not well
        (sentence,) = [
            line for line in said.splitlines() if not line.startswith("tuft: ") or surface != "cell"
        ]
        assert all(part in sentence for part in asked.says)
        assert not (surface == "script" and connect.is_initialized())


def test_an_sdk_that_cannot_work_is_refused_when_it_is_asked_for(world: World) -> None:
    """S1-08: before, everything else can be looked at."""
    world.patch(connect, "sdk_version", lambda: "0.15.2")
    with pytest.raises(TuftConnectionError, match=r'tinker 0.15.2 .*pip install "tinker>=0.38,<0.39"'):
        tuft_jupyter.get_service_client()


def test_a_server_that_died_is_said_by_the_next_command(world: World) -> None:
    """The connection stands, the server does not: every command says so, and what connects anew."""
    in_a_cell("init")
    world.server.routes.clear()
    world.server.close()
    for line in ("status", "runs", "why", "checkpoints", "sample hello"):
        well, said = in_a_cell(line)
        assert not well
        assert f"The TuFT server at {world.server.address} does not answer" in said, said
        assert "`%tuft init`" in said
        assert len(said.splitlines()) == 1


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
