"""Servers without a notebook server: the daemon, and the one that a kernel or a script starts for itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.live import EXAMPLES, ROOT, TO_THE_END, ask, environment, key_of, python, quickest, until
from tests.support.stub_server import KEY
from tests.support.tiny_models import make_model
from tuft_jupyter import home as homes
from tuft_jupyter.kernel import discovery
from tuft_jupyter.kernel.client import Client
from tuft_jupyter.kernel.errors import TuftConnectionError

BIN = Path(sys.executable).parent
SPELLINGS = {
    "tuft launch": [str(BIN / "tuft"), "launch"],
    "jupyter tuft launch": [str(BIN / "jupyter"), "tuft", "launch"],
    "python -m": [sys.executable, "-m", "tuft_jupyter_server"],
}
GONE_SECONDS = 10.0

OWNER = """
import json, os, sys, time, tuft_jupyter
from tuft_jupyter.kernel import connect
tuft_jupyter.init(config=sys.argv[1], report=lambda *_: None)
connection = connect.current()
print(json.dumps({"address": connection.address, "pid": connection.server.process.pid}), flush=True)
sys.stdin.readline()
"""

NOBODY = 65534
LOOKALIKE = """
import encodings.idna, json, os, sys
from tests.support.stub_server import StubServer
os.setuid({uid})
with StubServer(key="{key}") as server:
    print(server.address, flush=True)
    sys.stdin.read()
    print(json.dumps(server.asked))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    return environment(home, HOME=str(home / "user"))


@pytest.fixture
def config(home: Path) -> Path:
    path = home / "f.yaml"
    path.write_text("supported_models: [{model_name: tuft/demo}]\n")
    return path


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def alive(address: str) -> bool:
    return Client(address).alive()


class Daemon:
    def __init__(self, command: list[str], env: dict[str, str], port: int, log: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)], env=env, stdout=output, stderr=output, start_new_session=True
            )
        until(lambda: self.told(env) or self.process.poll() is not None, 60, "the daemon did not start")
        assert self.process.poll() is None, log.read_text()

    def told(self, env: dict[str, str]) -> bool:
        """Whether it says where it is: it answers before that."""
        return homes.read_address(homes.home_dir(env)) == self.address

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def daemon(env: dict[str, str], config: Path, port: int, home: Path) -> Iterator[Daemon]:
    running = Daemon([*SPELLINGS["python -m"], "--config", str(config)], env, port, home / "daemon.log")
    yield running
    running.stop()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_daemon_starts_in_every_spelling_and_ends_cleanly(
    spelling: str, env: dict[str, str], config: Path, port: int, home: Path
) -> None:
    """S0-02, S0-08, S0-22: healthz answers; the address file is private, and gone with the daemon."""
    running = Daemon([*SPELLINGS[spelling], "--config", str(config)], env, port, home / "daemon.log")
    try:
        file = home / "tuft" / "tuft_current_server"
        assert alive(running.address)
        assert file.read_text().strip() == running.address
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        models = ask(running.address, "get_server_capabilities", key_of(home))["supported_models"]
        assert [model["model_name"] for model in models] == ["tuft/demo"]
    finally:
        assert running.stop() == 0
    assert not file.exists()


def test_one_directory_with_models_and_checkpoints_is_served_by_the_old_command(
    env: dict[str, str], port: int, home: Path
) -> None:
    """S1-28: checkpoints, two models and models.yaml below one directory, as a container has them in /data."""
    data = home / "data"
    names = ("Qwen3-8B", "Qwen3-32B")
    for name in names:
        make_model(data / name)
    listed = [{"model_name": f"Qwen/{name}", "model_path": str(data / name)} for name in names]
    (data / "models.yaml").write_text(json.dumps({"supported_models": listed}))
    command = [str(BIN / "tuft"), "--checkpoint-dir", str(data / "checkpoints")]
    running = Daemon([*command, "--model-config", str(data / "models.yaml")], env, port, home / "daemon.log")
    try:
        models = ask(running.address, "get_server_capabilities", key_of(home))["supported_models"]
        assert [model["model_name"] for model in models] == [f"Qwen/{name}" for name in names]
        assert (data / "checkpoints").is_dir()
    finally:
        assert running.stop() == 0


def test_a_daemon_listens_on_loopback_only(daemon: Daemon) -> None:
    """S0-39."""
    sockets = psutil.Process(daemon.process.pid).net_connections()
    assert {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_a_daemon_is_found_by_the_process_scan(daemon: Daemon) -> None:
    """S0-23: on a port of its own, without environment and file; another user's process is ignored."""
    assert daemon.address in list(discovery.daemons())


@pytest.mark.parametrize("user", ["this user", "another user"])
def test_a_server_of_another_user_is_neither_found_nor_told_the_key(
    user: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-23: a process that looks and answers as a daemon does, under this user's id and really under another's;
    neither the process scan nor an address file leads there."""
    if os.getuid() != 0 and user == "another user":
        pytest.skip("only root can start a process of another user")
    script = home / "bin" / "tuft"
    script.parent.mkdir()
    script.write_text(LOOKALIKE.format(uid=NOBODY if user == "another user" else os.getuid(), key=KEY))
    process = subprocess.Popen(
        [sys.executable, script, "launch"],
        env=environment(home), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        found = address in list(discovery.daemons())
        monkeypatch.setattr(discovery, "daemons", lambda: iter(()))
        monkeypatch.setattr(discovery, "notebook_servers", lambda env: iter(()))
        monkeypatch.setattr(discovery, "DEFAULT_PORT", int(address.rpartition(":")[2]))
        env = {"TUFT_HOME": str(home / "tuft")}
        homes.write_address(home / "tuft", address)
        with suppress(TuftConnectionError):  # this user's own lookalike refuses a key that is not its own
            discovery.discover(None, None, env)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    keys = {key for _, key in json.loads(told) if key}
    mine = user == "this user"
    assert found == mine
    assert keys == ({key_of(home)} if mine else set())


def test_the_command_shows_the_running_server(daemon: Daemon, env: dict[str, str]) -> None:
    """`tuft status` finds it as `%tuft init` does; without one, it says what to do."""
    done = subprocess.run([str(BIN / "tuft"), "status"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in (daemon.address, "address file", "tuft/demo: idle", "version"):
        assert part in done.stdout
    assert daemon.stop() == 0
    done = subprocess.run([str(BIN / "tuft"), "status"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`tuft launch` starts one" in done.stderr


def test_a_port_in_use_is_said_at_once(env: dict[str, str], config: Path, port: int) -> None:
    """S0-40: an error that names the port, in less than 5 s."""
    command = [*SPELLINGS["python -m"], "--config", str(config), "--port", str(port)]

    def launched() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    with socket.create_server(("127.0.0.1", port)):
        done, seconds = quickest(launched, 5)
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 5


def test_a_script_uses_a_running_daemon_and_leaves_it_running(daemon: Daemon, env: dict[str, str]) -> None:
    """S0-09, S0-13, S0-43, S0-44, S0-47: found by its address file; nothing is started; shutdown only
    disconnects.
    """
    script = """
import tuft_jupyter
from tuft_jupyter.kernel import connect
tuft_jupyter.init()
connection = connect.current()
assert connection.server is None
tuft_jupyter.shutdown()
assert not tuft_jupyter.is_initialized()
"""
    done = python(script, env)
    assert done.returncode == 0, done.stderr
    assert f"tuft: discovered: {daemon.address} (address file)" in done.stdout
    assert alive(daemon.address)


def test_a_script_s_own_server_ends_with_shutdown(env: dict[str, str], config: Path, home: Path) -> None:
    """S0-07, S0-08, S0-16, S0-18, S0-38, S0-47: started, connected, stopped; nothing is written outside the
    home.
    """
    script = """
import sys, tuft_jupyter
from tuft_jupyter.kernel import connect
from tuft_jupyter.kernel.client import Client
tuft_jupyter.init(config=sys.argv[1])
address = connect.current().address
assert Client(address).alive()
tuft_jupyter.shutdown()
assert not tuft_jupyter.is_initialized()
assert not Client(address).alive()
tuft_jupyter.shutdown()
"""
    done = python(script, env, str(config))
    assert done.returncode == 0, done.stderr
    for phase in ("config:", "started:", "connected:"):
        assert f"tuft: {phase}" in done.stdout
    assert "nothing is kept (persistence: disabled)" in done.stdout
    assert not (home / "user" / ".tuft").exists()


def test_without_arguments_the_environment_is_enough(env: dict[str, str], home: Path) -> None:
    """S0-19, S0-29, S0-30: TUFT_MODEL_PATH alone; the start message names where the journal is kept."""
    done = python("import tuft_jupyter; tuft_jupyter.init()", env | {"TUFT_MODEL_PATH": "tuft/demo"})
    assert done.returncode == 0, done.stderr
    assert "tuft: generated config:" in done.stdout
    assert f"the journal is kept in {home / 'tuft' / 'journal.sqlite'} (file_redis)" in done.stdout
    assert "base models: tuft/demo" in done.stdout


def test_a_configuration_that_cannot_work_is_told_with_the_end_of_the_log(
    env: dict[str, str], home: Path
) -> None:
    """S0-49: a dying server is noticed at once, and its last words are shown in less than 10 s."""
    path = home / "bad.yaml"
    path.write_text("supported_models: [{model_name: a, model_path: /no/such/model}]\n")
    script = "import sys, tuft_jupyter; tuft_jupyter.init(config=sys.argv[1])"
    done, seconds = quickest(lambda: python(script, env, str(path)), 10)
    assert done.returncode == 1
    assert "ended with code" in done.stderr
    assert "/no/such/model" in done.stderr
    assert "The whole log:" in done.stderr
    assert seconds < 10


class Owner:
    """A script that started a server and waits."""

    def __init__(self, env: dict[str, str], config: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(config)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.address, self.server = told["address"], told["pid"]

    def server_is_gone(self) -> bool:
        return not psutil.pid_exists(self.server)

    def close(self) -> None:
        for pid in (self.process.pid, self.server):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def owner(env: dict[str, str], config: Path) -> Iterator[Owner]:
    running = Owner(env, config)
    yield running
    running.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP], ids=lambda n: n.name)
def test_a_server_ends_with_its_owner_however_that_ends(number: signal.Signals, owner: Owner) -> None:
    """S0-09, S0-42: atexit does not run on signals; the pipe closes anyway."""
    os.kill(owner.process.pid, number)
    owner.process.wait()
    until(owner.server_is_gone, GONE_SECONDS, "the server outlived its owner")
    assert not alive(owner.address)


def test_a_server_ends_with_an_owner_that_simply_ends(owner: Owner) -> None:
    """S0-41: normal exit."""
    assert owner.process.stdin is not None
    owner.process.stdin.close()
    assert owner.process.wait(30) == 0
    until(owner.server_is_gone, GONE_SECONDS, "the server outlived its owner")


def test_ctrl_c_does_not_reach_the_server(owner: Owner) -> None:
    """S0-48: SIGINT to the owner's whole process group ends the owner's cell, not the server."""
    os.kill(owner.process.pid, signal.SIGSTOP)  # so that the owner cannot end before we looked
    os.killpg(owner.process.pid, signal.SIGINT)
    assert alive(owner.address)
    os.kill(owner.process.pid, signal.SIGCONT)
    owner.process.wait(30)
    until(owner.server_is_gone, GONE_SECONDS, "the server outlived its owner")


OFFLINE = """
import fcntl, runpy, socket, struct, sys

# A network namespace begins with its loopback interface down.
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    request = bytearray(struct.pack("16sH14x", b"lo", 0))
    fcntl.ioctl(control, 0x8913, request)
    flags = struct.unpack_from("H", request, 16)[0]
    fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", flags | 1))

import tuft_jupyter
tuft_jupyter.init("tuft/demo")
script = runpy.run_path(sys.argv[1])
tokenizer = script["training"].get_tokenizer()
assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"
print("tokens", script["sample"].sequences[0].tokens)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_readme_s_script_runs_without_any_network(env: dict[str, str]) -> None:
    """S0-06, S0-14, S1-30: a kernel-owned server, training, sampling and the tokenizer, in a namespace
    without a network.
    """
    isolated = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"], check=False).returncode:
        pytest.skip("this machine does not allow network namespaces")
    env = {name: value for name, value in env.items() if name != "HF_ENDPOINT"}
    done = subprocess.run(
        [*isolated, *TO_THE_END, "-c", OFFLINE, str(EXAMPLES / "end_to_end.py")],
        env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "base model tuft/demo" in done.stdout
    assert "Sample tokens:" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_quickstart_runs_without_a_notebook_server(env: dict[str, str], home: Path) -> None:
    """S0-08, S1-29: `jupyter execute` has no server to find, so the notebook starts one of its own."""
    root = home / "notebooks"
    shutil.copytree(EXAMPLES, root)
    done = subprocess.run(
        [str(BIN / "jupyter"), "execute", "--timeout=300", str(root / "quickstart.ipynb")],
        env=env, capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(ROOT) not in done.stdout
