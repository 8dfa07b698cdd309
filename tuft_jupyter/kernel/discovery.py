"""Where the server is: the order of places to look, and the test that what answers there is one.

1. ``address=``; 2. a ``TINKER_BASE_URL`` of the user's own; 3. ``TUFT_ADDRESS``, or on a Hub its shared service; 4.
``$TUFT_HOME/tuft_current_server``; 5. this user's running daemons and notebook servers; 6.
``http://127.0.0.1:10610``. The first two are explicit: if they do not answer, that is an error and nothing
else is tried. The value that the notebook server itself puts into ``TINKER_BASE_URL`` equals ``TUFT_ADDRESS``
and does not count as the user's own.

It promises to wait at most two seconds for each place where nothing is alive, and to hand the user's generated key to
no process of another user on this machine.
"""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tuft_jupyter import home as homes
from tuft_jupyter.config import DEFAULT_PORT
from tuft_jupyter.kernel.client import PROBE_SECONDS, Client, Refused, Unreachable, is_loopback, normal
from tuft_jupyter.kernel.errors import TuftConnectionError

HUB_SECONDS = 30.0
"""The Hub's service is the one place to go, and may be busy when everybody begins at once."""
PATIENCE = 60.0
"""With a server that was named and is alive: before it answers anything else it reads its journal."""
BUSY_SECONDS = 0.5
REFUSED = "the server there refuses this key"
OTHER_KEY = "; pass api_key= or set TUFT_API_KEY to a key of that server"
OUR_COMMANDS = ("tuft", "jupyter-tuft")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answered: where, how it was found, what it offers, and the key it took."""

    address: str
    source: str
    models: list[str]
    key: str = field(repr=False)

    @property
    def client(self) -> Client:
        return Client(self.address, self.key)


def discover(
    address: str | None,
    api_key: str | None,
    env: Mapping[str, str] = os.environ,
    *,
    here: bool = False,
    note: Note = lambda _: None,
) -> Found | None:
    """The first place that answers, None if none does. ``here`` ignores a ``TINKER_BASE_URL`` of the user's
    own.

    ``note`` is told, in a sentence each, of places that were named but passed over. TuftConnectionError if an
    explicit place does not answer or refuses the key, or if a place that was named refuses it and no other answers.
    """
    home = homes.home_dir(env)
    if address:
        return _explicit(normal(address), "address=", api_key or _key(home, env))
    own_url = user_base_url(env)
    if own_url and not here:
        key = api_key or env.get("TINKER_API_KEY") or _key(home, env)
        return _explicit(own_url, "TINKER_BASE_URL", key, "; unset it, or use `%tuft init --here`")
    shared = _hub_service(env)
    if shared is not None and normal(env.get("TUFT_ADDRESS") or shared[0]) == shared[0]:
        place, hub_key = shared
        outcome = check(place, hub_key, HUB_SECONDS)
        if isinstance(outcome, list):
            return Found(place, "JupyterHub's shared service", outcome, hub_key)
        raise TuftConnectionError(
            f"Cannot connect to JupyterHub's shared service at {place} (from TUFT_HUB_SERVICE): {outcome}; "
            "tell your Hub's admins"
        )
    key = api_key or _key(home, env)
    given = bool(api_key or env.get("TUFT_API_KEY"))
    tried: set[str] = set()
    refused: tuple[str, str, str] | None = None
    for place, source in _implicit(home, env):
        may_be_anybody_s = (
            source != "TUFT_ADDRESS" and not given
        )  # files and processes say where a server was
        if place in tried or (may_be_anybody_s and _of_another_user(place)):
            continue
        tried.add(place)
        outcome = check(place, key, patience=PATIENCE if source == "TUFT_ADDRESS" else PROBE_SECONDS)
        if isinstance(outcome, list):
            if refused is not None:
                note(_passed_over(*refused))
            return Found(place, source, outcome, key)
        if source in ("TUFT_ADDRESS", "address file"):
            if refused is None and REFUSED in outcome:
                refused = place, source, outcome
            else:
                note(_passed_over(place, source, outcome))
    if refused is not None:  # nothing else answers, so this is what is wrong
        raise TuftConnectionError(_sentence(*refused, OTHER_KEY))
    return None


def user_base_url(env: Mapping[str, str]) -> str | None:
    """``TINKER_BASE_URL`` if the user set it, None if it is unset or what the notebook server put there."""
    url = env.get("TINKER_BASE_URL")
    if not url or normal(url) == normal(env.get("TUFT_ADDRESS") or "-"):
        return None
    return normal(url)


def check(
    address: str, key: str, seconds: float = PROBE_SECONDS, patience: float = PROBE_SECONDS
) -> list[str] | str:
    """The models a server offers to this key, or why it cannot be used, as the end of a sentence.

    One that does not answer at all is given ``seconds``, one that is alive ``patience``. Alive is not enough: something
    else on the port may be. A Tinker server also says what it offers.
    """
    nobody = "no TuFT server answers there"
    try:
        if Client(address).call("GET", "healthz", timeout=seconds).get("status") != "ok":
            return nobody
    except Refused as error:
        return f"the server there cannot be used ({error})" if error.status == 503 else nobody
    except Unreachable as error:
        untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
        return (
            "the certificate there is not trusted here (SSL_CERT_FILE may name it)" if untrusted else nobody
        )
    try:
        return _offered(Client(address, key), max(seconds, patience))
    except Refused as error:
        if error.status in (401, 403):
            return f"{REFUSED} ({error})"
        if error.status in (307, 429):
            return f"the server there cannot be used now ({error})"
        return "what answers there is not a TuFT server"
    except Unreachable:
        return "the server there does not answer in time"


def _offered(client: Client, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return client.models(timeout=max(deadline - time.monotonic(), 0.1))
        except Refused as error:  # "not ready yet", said again and again while a long journal is read
            if error.status != 429 or time.monotonic() + BUSY_SECONDS > deadline:
                raise
            time.sleep(BUSY_SECONDS)


def _explicit(address: str, source: str, key: str, remedy: str = "") -> Found:
    outcome = check(address, key, patience=PATIENCE)
    if isinstance(outcome, list):
        return Found(address, source, outcome, key)
    if REFUSED in outcome:
        remedy = OTHER_KEY
    elif not remedy:
        remedy = "; start one there with `tuft launch`, or leave the address out: `%tuft init` finds one"
    raise TuftConnectionError(_sentence(address, source, outcome, remedy))


def _passed_over(address: str, source: str, outcome: str) -> str:
    return f"{source} says {address}, but {outcome}; looking further"


def _sentence(address: str, source: str, outcome: str, remedy: str) -> str:
    return f"Cannot connect to TuFT at {address} (from {source}): {outcome}{remedy}."


def _hub_service(env: Mapping[str, str]) -> tuple[str, str] | None:
    """The Hub's shared service and this kernel's key there: its Hub token, as the SDK wants keys to begin."""
    service, token = env.get("TUFT_HUB_SERVICE"), env.get("JUPYTERHUB_API_TOKEN")
    return (normal(service), homes.KEY_PREFIX + token) if service and token else None


def _key(home: Path, env: Mapping[str, str]) -> str:
    return env.get("TUFT_API_KEY") or homes.ensure_key(home)


def _implicit(home: Path, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if env.get("TUFT_ADDRESS"):
        yield normal(env["TUFT_ADDRESS"]), "TUFT_ADDRESS"
    current = homes.read_address(home)
    if current:
        yield normal(current), "address file"
    yield from ((place, "running daemon") for place in daemons())
    yield from ((place, "running Jupyter server") for place in notebook_servers(env))
    yield f"http://127.0.0.1:{DEFAULT_PORT}", "default port"


def daemons() -> Iterator[str]:
    """Addresses of this user's own ``tuft launch`` processes, newest first."""
    yield from (address for _, address in daemon_processes())


def daemon_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Those processes themselves, each with its address."""
    mine = [p for p in psutil.process_iter() if _is_own(p)]
    for process in sorted(mine, key=_started, reverse=True):
        try:
            arguments = launch_arguments(process.cmdline())
            if arguments is not None:
                yield process, _address(arguments, process.environ(), _listening(process))
        except (psutil.Error, OSError):
            continue


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows our command in a command line, None if the process is something else (``ssh tuft -v``)."""
    words = _program(command)
    names = [Path(word).name for word in words[:2]]
    if names in (["jupyter", "tuft"], ["-m", "tuft_jupyter_server"]):
        rest = words[2:]
    elif names and names[0] in OUR_COMMANDS:
        rest = words[1:]
    else:
        return None
    serves = rest[:1] == ["launch"] or (rest[:1] and rest[0].startswith("-"))
    return rest if serves else None


def _program(command: list[str]) -> list[str]:
    """A command line from its program on: without the interpreter of a script, and that one's options."""
    if not command or not Path(command[0]).name.lower().startswith("python"):
        return command
    n = 1
    while n < len(command) and command[n].startswith("-") and command[n] != "-m":
        n += 2 if command[n] in ("-X", "-W") else 1
    return command[n:]


def notebook_servers(env: Mapping[str, str]) -> Iterator[str]:
    """TuFT below this user's running Jupyter servers, the one that started this kernel first.

    Each says where it is in a file of Jupyter's runtime directory. The file is read here: jupyter_server's own reader
    takes seconds to import.
    """
    from jupyter_core.paths import jupyter_runtime_dir

    servers = []
    for file in Path(jupyter_runtime_dir()).glob("jpserver-*.json"):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if psutil.pid_exists(told["pid"]):
                servers.append((str(told["pid"]), str(told["url"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for _, url in sorted(servers, key=lambda server: server[0] != env.get("JPY_PARENT_PID")):
        yield normal(f"{url.rstrip('/')}/tuft")


def _address(arguments: list[str], env: Mapping[str, str], listening: Collection[int] = ()) -> str:
    """Where a daemon with these arguments serves. ``listening`` are the ports it is seen to listen on."""
    options = {"--host": env.get("TUFT_HOST"), "--port": env.get("TUFT_PORT")}
    for n, part in enumerate(arguments):
        name, equals, value = part.partition("=")
        name = "--port" if name == "-p" else name
        if name in options:
            options[name] = value if equals else "".join(arguments[n + 1 : n + 2])
    host, port = options["--host"] or "", options["--port"] or str(DEFAULT_PORT)
    if listening and port not in map(str, listening):  # its file says another, or it took any that was free
        answering = (p for p in sorted(listening) if Client(homes.reached_at(host, p)).alive())
        port = str(next(answering, port))
    return homes.reached_at(host, port)


def _listening(process: psutil.Process) -> list[int]:
    connections = process.net_connections(kind="tcp")
    return [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]


def _is_own(process: psutil.Process) -> bool:
    try:
        return process.pid != os.getpid() and process.uids().real == os.getuid()
    except psutil.Error:
        return False


def _started(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.Error:
        return 0.0


def _of_another_user(address: str) -> bool:
    """Whether a loopback port is held by a process of another user. Linux tells; elsewhere nobody is
    accused.
    """
    if not is_loopback(address):
        return False
    parts = urllib.parse.urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    holders = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                holders.add(int(columns[7]))
    return bool(holders) and os.getuid() not in holders
