"""Where Ray is to be found, and where a Ray of our own keeps its files.

Pure decisions and small files; Ray itself is not imported. Promises: an address that somebody named is answered for
within seconds, another user's cluster is never joined by accident, and what we write is readable by its owner alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.home import write_private
from tuft_jupyter.machine import outward_ip

LOCAL = "local"
AUTO = "auto"
REQUIRE = "require"
PROBE_SECONDS = 2.0
TEMP_LENGTH = 40
"""Longest temporary directory under which Ray's socket paths stay below the 107 bytes that Unix allows."""
KEPT_SESSIONS = 3
SYSTEM_TEMP = Path("/tmp")
CURRENT_CLUSTER = SYSTEM_TEMP / "ray" / "ray_current_cluster"
"""Where ``ray start`` writes the address of the cluster it made."""
GPU_DEVICES = Path("/proc/driver/nvidia/gpus")
DEFAULT_PORT = 6379
START = """\
ray start --head \\
  --port {port} \\
  --node-ip-address {ip} \\
  --num-gpus {gpus} \\
  --temp-dir {temp} \\
  --disable-usage-stats"""
JOIN = """\
ray start \\
  --address {ip}:{port} \\
  --num-gpus {gpus} \\
  --temp-dir {temp} \\
  --disable-usage-stats"""


@dataclass(frozen=True, slots=True)
class Place:
    """``address`` is ``local`` or a cluster's; ``why`` says who chose it."""

    address: str
    why: str

    @property
    def local(self) -> bool:
        return self.address == LOCAL


def asked(configured: str | None, env: Mapping[str, str]) -> Place:
    """The configured address, else ``RAY_ADDRESS``, else a local Ray of our own; it may be ``auto`` or ``require``."""
    if configured:
        return Place(configured, "ray_address is set")
    if env.get("RAY_ADDRESS"):
        return Place(env["RAY_ADDRESS"], "RAY_ADDRESS is set")
    return Place(LOCAL, "no address is set")


def choose(configured: str | None, env: Mapping[str, str], current: Path | None = None) -> Place:
    """What :func:`asked` says, with an address found where it names none.

    ``auto`` joins a cluster that this user started on this machine and falls back to a local one, ``require`` does not
    fall back. ServerError if the cluster that was found is another user's. ``current`` is the file that names it.
    """
    place = asked(configured, env)
    if place.address not in (AUTO, REQUIRE):
        return place
    current = current or next(filter(Path.is_file, _current_clusters()), CURRENT_CLUSTER)
    found = _found(current, place.why)
    if found.local and place.address == REQUIRE:
        commands = start_commands()
        raise ServerError(
            f"{found.why}. ray_address is {REQUIRE}, so none is started here. Start one, on this machine:\n"
            f"{commands['head']}\nand on each further node:\n{commands['worker']}"
        )
    return found


def start_commands() -> dict[str, str]:
    """What starts a cluster with this machine as its ``head``, and what a further node, a ``worker``, joins it with."""
    gpus = len(list(GPU_DEVICES.iterdir())) if GPU_DEVICES.is_dir() else 0
    temp = f"{SYSTEM_TEMP}/ray_{os.getuid()}"
    values = {"ip": outward_ip(), "port": DEFAULT_PORT, "temp": temp}
    return {"head": START.format(gpus=gpus, **values), "worker": JOIN.format(gpus="<N>", **values)}


def probe(address: str) -> None:
    """ServerError, within seconds, if nobody listens at a cluster's address: Ray itself would wait for minutes."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    host = parts.hostname or ""
    try:
        port = parts.port or DEFAULT_PORT
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ServerError(
            f"the Ray cluster at {address!r} cannot be reached ({error}): start it, correct the address, or set "
            "RAY_ADDRESS=local for a Ray of our own"
        ) from None


def token_file(home: Path) -> Path:
    """The file with the secret that our local Ray's processes share; made when it is missing."""
    path = home / "ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or not path.stat().st_size:
        write_private(path, secrets.token_hex(32))
    path.chmod(0o600)
    return path


def auth_mode(env: Mapping[str, str]) -> str:
    """How to speak to a named cluster: as told, else with a token if there is one.

    Always explicit: Ray's own default differs between its command line and its library.
    """
    if env.get("RAY_AUTH_MODE"):
        return env["RAY_AUTH_MODE"]
    known = env.get("RAY_AUTH_TOKEN") or env.get("RAY_AUTH_TOKEN_PATH")
    return "token" if known or Path("~/.ray/auth_token").expanduser().is_file() else "disabled"


def temp_dir(root: Path | None = None) -> Path:
    """``<tmp>/ray_<uid>``, ours alone; ServerError if somebody else made it before us."""
    uid = os.getuid()
    path = (root or Path(tempfile.gettempdir())) / f"ray_{uid}"
    if len(str(path)) > TEMP_LENGTH:
        path = SYSTEM_TEMP / path.name
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != uid:
        raise ServerError(
            f"{path} belongs to somebody else: remove it, or set TMPDIR to a directory of your own"
        )
    path.chmod(0o700)
    return path


def own_sessions() -> str:
    """The directories of all sessions that this process ever starts, as a pattern: their names end with its pid."""
    return f"{temp_dir()}/session_*_{os.getpid()}"


def prune_sessions(temp: Path) -> None:
    """Remove what dead servers left in the temporary directory, but for the newest logs."""
    dead = [
        path
        for path in temp.glob("session_*_*")
        if path.is_dir() and not path.is_symlink() and _is_dead(path)
    ]
    for path in sorted(dead, key=lambda path: path.stat().st_mtime)[:-KEPT_SESSIONS]:
        shutil.rmtree(path, ignore_errors=True)


def _is_dead(session: Path) -> bool:
    """A session directory's name ends with the pid of the process that called ``ray.init``."""
    pid = session.name.rpartition("_")[2]
    return pid.isdecimal() and not psutil.pid_exists(int(pid))


def _current_clusters() -> list[Path]:
    """The files that may name it: ``ray start --temp-dir`` writes there."""
    return [SYSTEM_TEMP / f"ray_{os.getuid()}" / CURRENT_CLUSTER.name, CURRENT_CLUSTER]


def _found(current: Path, why: str) -> Place:
    try:
        address, owner = current.read_text(encoding="ascii").strip(), current.stat().st_uid
    except (OSError, UnicodeDecodeError):
        return Place(LOCAL, f"{why}, and no cluster was found")
    if owner != os.getuid():
        raise ServerError(
            f"the Ray cluster at {address} was started by another user (uid {owner}): set RAY_ADDRESS=local for a Ray "
            "of our own, or name the address if you may use it"
        )
    try:
        probe(address)
    except ServerError:
        return Place(LOCAL, f"{why}, and the cluster that was at {address} is gone")
    return Place(address, f"{why}, and a cluster of this user was found")
