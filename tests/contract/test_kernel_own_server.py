"""A kernel without a notebook server starts a server of its own: whose it is, and what outlives what."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.contract.test_kernel_servers import BIN, SPELLINGS, Daemon, alive, config, daemon, env, home, port
from tests.support.live import ask, below, key_of, python, until
from tests.support.stub_server import StubServer
from tuft_jupyter import home as homes
from tuft_jupyter.kernel import discovery, launch

__all__ = ["config", "daemon", "env", "home", "port"]

GONE_SECONDS = 10.0

pytestmark = pytest.mark.timeout(300)

START = """
%load_ext tuft_jupyter
%tuft init tuft/demo
import json, tuft_jupyter
from tinker import types
from tuft_jupyter.kernel import connect
training = tuft_jupyter.create_training_client(rank=4).result()
datum = types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                    loss_fn_inputs={"target_tokens": [42, 37, 99]})
def step():
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
step()
connection = connect.current()
print("OWNED " + json.dumps([connection.address, connection.server.process.pid]))
"""


class Notebook:
    """A real kernel, as an editor without a Jupyter server starts it."""

    def __init__(self, env: dict[str, str], home: Path) -> None:
        self.manager = KernelManager(kernel_name="python3")
        with (home / "kernel.log").open("wb") as log:
            self.manager.start_kernel(env=env, cwd=str(home), stdout=log, stderr=log)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(60)
        self.shown: list[str] = []

    def run(self, code: str, seconds: float = 200.0) -> str:
        """Run a cell; "ok", "error: ..." or "aborted". What it shows is in ``shown``."""
        reply = self.client.execute_interactive(code, timeout=seconds, output_hook=self._hear)
        return self._outcome(reply["content"])

    def ended(self, asked: str, seconds: float = 60.0) -> str:
        """How a cell that was sent before ended."""
        while True:
            reply = self.client.get_shell_msg(timeout=seconds)
            if reply["parent_header"].get("msg_id") == asked:
                return self._outcome(reply["content"])

    @staticmethod
    def _outcome(content: dict[str, Any]) -> str:
        return content["status"] if content["status"] != "error" else f"error: {content['ename']}"

    def _hear(self, message: dict[str, Any]) -> None:
        content = message["content"]
        self.shown.append(content.get("text") or content.get("data", {}).get("text/plain", ""))

    def close(self) -> None:
        self.client.stop_channels()
        if self.manager.is_alive():
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture
def notebook(env: dict[str, str], home: Path) -> Iterator[Notebook]:
    made = Notebook({**env, "HF_HUB_OFFLINE": "1"}, home)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["shutdown", "kill"])
def test_a_kernel_s_server_and_its_workers_end_with_the_kernel(
    end: str, notebook: Notebook, home: Path
) -> None:
    """S0-07, S0-09, S0-38, S0-41, S0-42, S0-48, S0-49: started with progress, untouched by an interrupt, gone in
    10 s with all its Ray processes; and nothing is written outside the home."""
    assert notebook.run(START) == "ok", notebook.shown
    told = "\n".join(notebook.shown)
    for phase in (
        "generated config",
        "started",
        "is starting ...",
        "is loaded after",
        "loading tuft/demo",
        "connected",
    ):
        assert phase in told
    address, pid = json.loads(told.rpartition("OWNED ")[2])
    server = psutil.Process(pid)
    family = [server, *server.children(recursive=True)]
    assert below(pid, "ray::")

    if end == "shutdown":
        # After an error a kernel refuses what comes within a moment, unless it is told not to.
        endless = notebook.client.execute(
            "while True: step(); print('stepped', flush=True)", stop_on_error=False
        )
        until(lambda: "stepped" in _heard(notebook), 60, "the loop does not run")
        notebook.manager.interrupt_kernel()
        assert notebook.ended(endless) == "error: KeyboardInterrupt"
        assert notebook.run("step()") == "ok", "the kernel trains on after an interrupt"
        assert alive(address)
        notebook.manager.shutdown_kernel()
    else:
        os.kill(int(notebook.manager.provisioner.pid), signal.SIGKILL)
    until(
        lambda: not any(map(_lives, family)), GONE_SECONDS, f"left behind: {[p for p in family if _lives(p)]}"
    )
    assert not alive(address)
    assert homes.read_address(home / "tuft") is None
    assert not (home / "user" / ".tuft").exists()


def _heard(notebook: Notebook) -> str:
    """The next thing that the running cell says."""
    message = notebook.client.get_iopub_msg(timeout=60)
    return str(message["content"].get("text", ""))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


THREADS = """
import sys, threading, psutil, tuft_jupyter
from tuft_jupyter.kernel import connect
seen = []
def run():
    tuft_jupyter.init(config=sys.argv[1], report=lambda *_: None)
    seen.append(id(connect.current()))
threads = [threading.Thread(target=run) for _ in range(20)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(seen) == 20 and len(set(seen)) == 1, seen
assert tuft_jupyter.get_service_client() is tuft_jupyter.get_service_client()
print("children", len(psutil.Process().children()))
"""


def test_twenty_threads_start_one_server(env: dict[str, str], config: Path) -> None:
    """S0-19b, S0-45: one connection, one process, one client of the stock SDK."""
    done = python(THREADS, env, str(config))
    assert done.returncode == 0, done.stderr
    assert "children 1\n" in done.stdout


def test_a_default_file_alone_is_enough(env: dict[str, str], config: Path, home: Path) -> None:
    """S0-19, S0-31: neither arguments nor variables."""
    default = homes.default_config(home / "tuft")
    default.parent.mkdir(parents=True)
    config.rename(default)
    done = python("import tuft_jupyter; tuft_jupyter.init()", env)
    assert done.returncode == 0, done.stderr
    assert f"tuft: config: {default} (from the default file)" in done.stdout
    assert "base models: tuft/demo" in done.stdout


def test_with_a_daemon_up_nothing_is_started(daemon: Daemon, env: dict[str, str]) -> None:
    """S0-13, S0-17: neither where one is found, nor where the address that was given is dead."""
    script = """
import psutil, tuft_jupyter
tuft_jupyter.init()
found = len(psutil.Process().children())
tuft_jupyter.shutdown()
try:
    tuft_jupyter.init(address="http://127.0.0.1:9")
except RuntimeError as error:
    print(error)
print("children", found, len(psutil.Process().children()))
"""
    done = python(script, env)
    assert done.returncode == 0, done.stderr
    assert "Cannot connect to TuFT at http://127.0.0.1:9" in done.stdout
    assert "children 0 0" in done.stdout


@pytest.mark.parametrize("how", ["any free port", "a port of the file", "every address"])
def test_a_daemon_is_found_and_stopped_wherever_it_listens(
    how: str, env: dict[str, str], config: Path, port: int, home: Path
) -> None:
    """S0-23, S0-40: port 0 takes a free one and writes it to the address file; the scan sees it without the file."""
    if how == "a port of the file":
        config.write_text(f"{config.read_text()}port: {port}\n")
        arguments, wanted = [], port
    else:
        everywhere = ["--host", "0.0.0.0"] if how == "every address" else []
        arguments, wanted = [*everywhere, "--port", "0"], None
    import subprocess

    with (home / "log").open("wb") as log:
        running = subprocess.Popen(
            [*SPELLINGS["tuft launch"], "--config", str(config), *arguments],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: homes.read_address(home / "tuft") is not None, 60, "no address file")
        address = str(homes.read_address(home / "tuft"))
        assert address.startswith("http://127.0.0.1:")
        assert wanted is None or address.endswith(f":{wanted}")
        assert ask(address, "healthz", key_of(home))["status"] == "ok"
        homes.address_path(home / "tuft").unlink()
        assert address in list(discovery.daemons())
        stopped = subprocess.run(
            [str(BIN / "tuft"), "stop", "--address", address],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert stopped.returncode == 0, stopped.stderr
        assert running.wait(30) == 0
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()


def test_a_port_that_was_taken_in_the_meantime_is_left_to_who_took_it(
    env: dict[str, str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-40: between choosing and listening, another server was quicker; it is not taken for our own."""
    real = launch.choose_port
    with StubServer() as other:
        taken = iter([other.port])
        monkeypatch.setattr(launch, "choose_port", lambda host, asked: next(taken, None) or real(host, asked))
        server = launch.start(config, env)
        try:
            assert server.address != other.address
            assert alive(server.address)
        finally:
            server.stop()
