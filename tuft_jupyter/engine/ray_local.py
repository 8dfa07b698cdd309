"""A Ray of our own on this machine: how it is started, which processes it is, and what ends them.

It listens on loopback only, under a token of our own, without dashboard and without usage statistics. Measured with
Ray 2.60, and guarded against here:

* ``_node_ip_address="127.0.0.1"`` is silently replaced by the outward address, and then all ports are open to the
  network. Ray's switch for desktop systems keeps it on loopback; we look afterwards.
* Agents outlive a killed driver, for good if it dies while they start: :mod:`~tuft_jupyter.engine.reaper` ends them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import ray_place, reaper
from tuft_jupyter.home import write_private

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Bodies over 100 KB pass through it, a few at a time."""
ATTEMPTS = 2
"""Ray gives its own processes 30 s to come up, which a busy machine may exceed."""
VITAL = ("gcs_server", "raylet")
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")
"""Parts of a Ray node that we never ask anything: autoscaler, log forwarding, dashboard. Without them Ray starts in
half the time and takes 230 MB less (measured with 2.60)."""
NEEDLESS_IMPORT = "rfc3987_syntax"
"""An optional part of jsonschema, which every process of Ray imports; it compiles a grammar for more than a second to
check identifiers of which Ray has none."""
FOR_EVER = "1000000000"
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": FOR_EVER}
"""Without it a process whose GCS is gone for 60 s exits, and ours is the notebook server."""


class Guard:
    """A process that kills its wards when we close it, or die."""

    def __init__(self) -> None:
        # A session of its own: a Ctrl-C in the terminal must not end it before us
        self._process = subprocess.Popen(
            [sys.executable, "-P", reaper.__file__],  # -P: modules beside it are not to be found
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def watch(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            self._tell(f"{process.pid} {process.create_time()}")

    def watch_sessions(self, directories: str) -> None:
        """Whatever of Ray works for a session in such a directory (``*``: any characters), also if it starts later."""
        self._tell(directories)

    def _tell(self, name: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.write(f"{name}\n")
            pipe.flush()

    def close(self) -> None:
        """Ray was ended in good order: what is left of it is killed now, and nothing is waited for."""
        self._tell(reaper.DONE)
        self._process.communicate()


def start(home: Path, namespace: str) -> tuple[Any, Path]:
    """(Ray's node object, the temporary directory); ServerError if it would listen to the network."""
    temp = ray_place.temp_dir()
    ray_place.prune_sessions(temp)
    settings = {
        "RAY_ADDRESS": None,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": None,
        "RAY_AUTH_TOKEN_PATH": str(ray_place.token_file(home)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [without_needless_import(home), os.environ.get("PYTHONPATH")])
        ),
        "RAY_worker_niceness": "0",  # Ray's 15 lets any other work on the machine starve training
        **PATIENT,
    }
    with environment(settings):
        ray = import_ray()
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # in case Ray was imported before us
        with _without(ray._private.node.Node, UNUSED):
            _init(ray, temp, namespace)
    node = ray._private.worker._global_node
    if node.node_ip_address != "127.0.0.1":
        ray.shutdown()
        raise ServerError(f"Ray listens on {node.node_ip_address} instead of loopback, so it was stopped")
    return node, temp


def processes(temp: Path) -> list[psutil.Process]:
    """The processes of the Ray that this process started, and no kernel's."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if str(temp) in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def import_ray() -> Any:
    """Ray, not yet started; ServerError if somebody else started it in this process."""
    import ray

    if ray.is_initialized():
        raise ServerError("other code in this process has already started Ray; restart the server")
    return ray


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Variables for Ray's processes, taken back at once: kernels that start later must not inherit them."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _apply(changes)
        yield
    finally:
        _apply(before)


def _init(ray: Any, temp: Path, namespace: str) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(
                address=ray_place.LOCAL,
                namespace=namespace,
                _temp_dir=str(temp),
                include_dashboard=False,
                num_cpus=0,  # our actors ask for none, and Ray then keeps no idle workers
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            for process in processes(temp):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if attempt == ATTEMPTS:
                raise
            log.warning("Ray did not start, trying again: %s", error)
        else:
            return


def without_needless_import(home: Path) -> str:
    """A directory for the module path in which :data:`NEEDLESS_IMPORT` is a module that is not there."""
    directory = home / "ray" / "path"
    directory.mkdir(parents=True, exist_ok=True)
    write_private(directory / f"{NEEDLESS_IMPORT}.py", "raise ImportError\n")
    return str(directory)


@contextlib.contextmanager
def _without(owner: Any, names: Iterable[str]) -> Iterator[None]:
    """Methods that do nothing for a while."""
    kept = {name: getattr(owner, name) for name in names}
    for name in kept:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(owner, name, method)


def _apply(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def log_tail(logs: Path | None, pid: int, lines: int = 20) -> list[str]:
    """The last lines that a worker process wrote, if its log is on this machine."""
    if logs is None or not pid:
        return []
    found: list[str] = []
    for path in sorted(logs.glob(f"worker-*-{pid}.out")) + sorted(logs.glob(f"worker-*-{pid}.err")):
        with contextlib.suppress(OSError):
            found += path.read_text(encoding="utf-8", errors="replace").splitlines()
    # Ray's own marks begin with a colon
    return [line for line in found if line.strip() and not line.startswith(":")][-lines:]


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
