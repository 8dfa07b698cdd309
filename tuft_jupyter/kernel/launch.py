"""Starts a server that belongs to this kernel, where there is none to connect to.

It knows where a configuration comes from (``config=``, ``TUFT_CONFIG``, ``model=``, ``TUFT_MODEL_PATH``, the
default file, in this order) and how to run ``python -m tuft_jupyter_server``. It promises that the server

* ends when its owner does, however that ends: it holds one end of a pipe (``TUFT_OWNER_FD``) and leaves at
its EOF; * is out of reach of Ctrl-C, in a session of its own; * is noticed at once if it dies while starting,
and then speaks through the end of its log.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from tuft_jupyter import home as homes
from tuft_jupyter.config import DEFAULT_PORT, generated_config
from tuft_jupyter.kernel.client import Client
from tuft_jupyter.kernel.errors import TuftConnectionError

OWNER_FD = "TUFT_OWNER_FD"
START_SECONDS = 120.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1
TAIL_LINES = 15
LOOPBACK = "127.0.0.1"

GUIDANCE = (
    "No TuFT server was found and there is nothing to start one from. Give one of: "
    "model= (a directory, a hub id or 'tuft/demo'), config= (a YAML file), address= (a running server); "
    "or set TUFT_ADDRESS, TUFT_MODEL_PATH or TUFT_CONFIG; or write {default} (tuft_config.yaml). "
    "In a notebook: %tuft init tuft/demo"
)

Report = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration file and, in words, where it comes from."""

    path: Path
    words: str
    generated: bool = False


def existing_config(config: str | os.PathLike[str]) -> Path:
    path = Path(config).expanduser()
    if not path.is_file():
        raise TuftConnectionError(
            f"Config file not found: {path}; name one that exists, or leave it out and name a model: "
            "`%tuft init tuft/demo`"
        )
    return path


def choose_config(
    config: str | os.PathLike[str] | None,
    model: str | None,
    env: Mapping[str, str] = os.environ,
    note: Callable[[str], None] = lambda _: None,
) -> Source:
    """The first source there is. TuftConnectionError if ``config`` is missing, or if there is no source at
    all.
    """
    home = homes.home_dir(env)
    if config is not None:
        return Source(existing_config(config), "config=")
    given = env.get("TUFT_CONFIG")
    if given:
        path = Path(given).expanduser()
        if path.is_file():
            return Source(path, "TUFT_CONFIG")
        note(f"TUFT_CONFIG names {path}, which does not exist; looking further")
    model, words = (model, "model=") if model else (env.get("TUFT_MODEL_PATH"), "TUFT_MODEL_PATH")
    default = homes.default_config(home)
    if not model and default.is_file():
        return Source(default, "the default file")
    if not model:
        raise TuftConnectionError(GUIDANCE.format(default=default))
    if model.startswith(("/", "~", "./", "../")) and not Path(model).expanduser().is_dir():
        raise TuftConnectionError(
            f"There is no directory {model} (from {words}); give the directory of a model, a hub id or 'tuft/demo': "
            "`%tuft init tuft/demo`"
        )
    path = home / "configs" / "generated.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    homes.write_private(path, yaml.safe_dump(generated_config(model, env), sort_keys=False))
    return Source(path, f"{words}{model}" if words == "model=" else words, generated=True)


@dataclass(slots=True)
class OwnedServer:
    """A running server of this kernel. Closing ``owner_end`` alone makes it leave."""

    address: str
    process: subprocess.Popen[bytes]
    owner_end: int
    log: Path
    _stopped: bool = field(default=False, repr=False)

    def stop(self) -> None:
        """Let it finish, then insist; safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        with suppress(OSError):
            os.close(self.owner_end)
        for insist in (None, signal.SIGTERM, signal.SIGKILL):
            if insist is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, insist)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                return

    def forget(self) -> None:
        """In a forked child: let go of the pipe, so that only the true owner keeps the server alive."""
        self._stopped = True
        with suppress(OSError):
            os.close(self.owner_end)


def start(config: Path, env: Mapping[str, str] = os.environ, timeout: float = START_SECONDS) -> OwnedServer:
    """Run a server with a configuration file; returns once it answers. TuftConnectionError says why it does
    not.
    """
    home = homes.home_dir(env)
    host = env.get("TUFT_HOST") or LOOPBACK
    port = choose_port(host, env.get("TUFT_PORT"))
    log = home / "logs" / f"server-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    server_end, owner_end = os.pipe()
    command = [sys.executable, "-m", "tuft_jupyter_server", "launch", "--config", str(config)]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", host, "--port", str(port)],
                env={**env, OWNER_FD: str(server_end)},
                pass_fds=(server_end,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except BaseException:
        os.close(owner_end)
        raise
    finally:
        os.close(server_end)
    server = OwnedServer(homes.reached_at(host, port), process, owner_end, log)
    os.register_at_fork(after_in_child=server.forget)
    try:
        _wait(server, port, timeout)
    except BaseException as error:
        server.stop()
        if isinstance(error, TuftConnectionError) and not env.get("TUFT_PORT") and not _free(host, port):
            return start(config, {**env, "TUFT_PORT": "0"}, timeout)  # another program was quicker
        raise
    return server


def choose_port(host: str, asked: str | None) -> int:
    """The port asked for (0: any free one), which must be free; unasked, 10610 or, if that is taken, any free
    one.
    """
    if asked and asked != "0":
        if not asked.isdecimal() or int(asked) > 65535:
            raise TuftConnectionError(f"TUFT_PORT must be a port number or 0, not {asked!r}.")
        if not _free(host, int(asked)):
            raise TuftConnectionError(
                f"Port {asked} is in use by another program; set TUFT_PORT to a free one, or to 0 for any."
            )
        return int(asked)
    if not asked and _free(host, DEFAULT_PORT):
        return DEFAULT_PORT
    with closing(_listen(host, 0)) as probe:
        return int(probe.getsockname()[1])


def _free(host: str, port: int) -> bool:
    try:
        _listen(host, port).close()
    except OSError:
        return False
    return True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _wait(server: OwnedServer, port: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not (_listens(server.process.pid, port) and Client(server.address).alive()):
        code = server.process.poll()
        if code is not None:
            raise TuftConnectionError(
                f"The TuFT server ended with code {code} while starting. Its log ends:\n{tail(server.log)}"
            )
        if time.monotonic() > deadline:
            raise TuftConnectionError(
                f"The TuFT server did not answer within {timeout:.0f} s. Its log ends:\n{tail(server.log)}"
            )
        time.sleep(POLL_SECONDS)


def _listens(pid: int, port: int) -> bool:
    """Whether it is this process that has the port, not one that took it in the meantime."""
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.AccessDenied:  # this system does not tell
        return True
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; keys are never logged, so they may be shown."""
    try:
        text = log.read_bytes().decode(errors="replace").strip()
    except OSError:
        text = ""
    ending = text.splitlines()[-lines:] or ["(it is empty)"]
    return "\n".join([*(f"    {line}" for line in ending), f"The whole log: {log}"])
