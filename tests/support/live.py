"""What tests of real servers share: an environment alone in a home of its own, scripts in it, plain HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:
    import tinker

Outcome = TypeVar("Outcome")
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TO_THE_END = (sys.executable, os.fspath(Path(__file__).with_name("to_the_end.py")))
"""``python``, for programs that use the SDK and whose exit status counts."""
OURS = ("TUFT_", "TINKER_", "HF_", "JUPYTER", "JPY_", "IPYTHON")


def environment(home: Path, **more: str) -> dict[str, str]:
    """An environment in which nothing of ours is set but ``home``, and everything is written below it.

    No network is assumed: a hub address that nobody answers at stands for a machine without one.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server_ext")]),
        "TUFT_HOME": str(home / "tuft"),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "jupyter"),
        "JUPYTER_DATA_DIR": str(home / "jupyter-data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "TINKER_TELEMETRY": "0",
        "TUFT_STANDBY_WORKER": "false",  # a test has no time to profit by one
        "OMP_NUM_THREADS": "1",
        **more,
    }


def key_of(home: Path) -> str:
    return (home / "tuft" / "credentials").read_text().strip()


@contextlib.contextmanager
def sdk(address: str, key: str) -> Iterator[tinker.ServiceClient]:
    """The stock SDK's client in this process, closed in the end.

    One that is left open asks for its server for ever, and warns of that in the logs of whatever test runs by then.
    """
    import tinker

    client = tinker.ServiceClient(base_url=address, api_key=key)
    try:
        yield client
    finally:
        with contextlib.suppress(tinker.TinkerError):  # what the server says of it is not the test's matter
            client.close("success").result(timeout=60)


def ask(address: str, path: str, key: str, body: Any = None) -> Any:
    """One call of the Tinker API below ``address``; the answer's JSON. HTTPError if it is refused."""
    request = urllib.request.Request(
        f"{address}/api/v1/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-API-Key": key, "Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.loads(answer.read())


def standby(address: str, key: str, seconds: float = 60) -> int:
    """The process that stands by for the training worker, as soon as there is one."""
    found: list[int] = []

    def there() -> bool:
        workers = ask(address, "tuft/gauges", key)["workers"]
        found[:] = [worker["pid"] for worker in workers if worker["name"].startswith("standby")]
        return bool(found)

    until(there, seconds, "no process stands by")
    return found[0]


def listening(process: psutil.Process) -> list[Any]:
    """The addresses (``ip``, ``port``) at which a process listens; none if it has ended meanwhile."""
    try:
        sockets = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return []
    return [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]


def below(pid: int, words: str) -> list[psutil.Process]:
    """The processes below one, however deep, that have ``words`` in their command line.

    For a moment there may be one more: what a process starts has its command line at first.
    """
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def standing_still(pid: int, words: str) -> Iterator[None]:
    """The processes that :func:`below` finds do nothing in the block."""
    stopped = below(pid, words)
    assert stopped
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()


def python(
    code: str, env: Mapping[str, str], *arguments: str, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, as a user's would."""
    return subprocess.run(
        [*TO_THE_END, "-c", code, *arguments],
        env=dict(env), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for what another process does; there is no event to wait on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def quickest(act: Callable[[], Outcome], seconds: float, tries: int = 3) -> tuple[Outcome, float]:
    """The outcome and the seconds of the first try within ``seconds``, else of the last one.

    What a busy machine does to one start is not what the product promises; a wait that is built in shows every time.
    """
    for _ in range(tries):
        began = time.monotonic()
        outcome = act()
        took = time.monotonic() - began
        if took < seconds:
            break
    return outcome, took
