"""Ray in this process: started once, off the event loop, and gone when we are gone.

A local Ray listens on loopback only, under a token of our own, without dashboard and without usage statistics. What
has been measured with Ray 2.60 and is guarded against here:

* ``ray.init`` and the first actor block for seconds: everything that starts or ends Ray runs in one thread. The
  kernel kills Ray's processes when the *thread* that made them ends (``PR_SET_PDEATHSIG``), so it never does.
* ``_node_ip_address="127.0.0.1"`` is silently replaced by the outward address, and then all ports are open to the
  network. Ray's switch for desktop systems keeps it on loopback; we look afterwards.
* A driver whose GCS is gone for 60 s exits the whole process, which would be the notebook server: the limit is
  lifted, and GCS and raylet are watched instead.
* Agents outlive a killed driver by a minute: :mod:`~tuft_jupyter.engine.reaper` ends them.
* Ray takes over SIGTERM; the handler that was there is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import ray_place, reaper
from tuft_jupyter.engine.ray_place import Place

log = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE = "tuft"
JOIN_SECONDS = 30.0
OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Bodies over 100 KB pass through it, a few at a time."""
FOR_EVER = "1000000000"
VITAL = ("gcs_server", "raylet")


class RayThread:
    """One daemon thread that runs what it is given, in order, for as long as the process lives."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="ray", daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    async def run(self, job: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.submit(job))

    def _serve(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                future.set_exception(error)


@dataclass(eq=False)
class Session:
    """One Ray that is up. ``lost`` says why it is not any more; ``watchers`` are told once, from some thread."""

    place: Place
    gpus: float
    logs: Path | None
    guard: subprocess.Popen[str] | None = None
    lost: str = ""
    closing: bool = False
    watchers: set[Callable[[str], None]] = field(default_factory=set)


class Runtime:
    """Ray for this process. ``users`` keep it up; when the last is gone it is shut down."""

    def __init__(self, home: Path, address: str | None) -> None:
        self.home = home
        self.address = address
        self.thread = RayThread()
        self._session: Session | None = None
        self._users: set[object] = set()

    async def acquire(self, user: object) -> Session:
        """Ray, started if need be, for as long as ``user`` does not release it; ServerError says why it cannot be."""
        self._users.add(user)
        starting = self.thread.run(self._ensure)
        try:
            session = await asyncio.wait_for(starting, None if self._is_local() else JOIN_SECONDS)
        except TimeoutError:
            raise ServerError(
                f"the Ray cluster at {self.address!r} did not answer within {JOIN_SECONDS:g} s"
            ) from None
        _keep_signal_handler()
        return session

    async def release(self, user: object) -> None:
        self._users.discard(user)
        await self.thread.run(lambda: None if self._users else self._shutdown())

    def guard(self, *pids: int) -> None:
        """Have a process of this machine killed should we die without ending it ourselves."""
        pipe = self._session.guard.stdin if self._session and self._session.guard else None
        for pid in pids:
            with contextlib.suppress(psutil.Error, OSError):
                created = psutil.Process(pid).create_time()
                if pipe is not None:
                    pipe.write(f"{pid} {created}\n")
                    pipe.flush()

    def _is_local(self) -> bool:
        return ray_place.LOCAL == (self.address or os.environ.get("RAY_ADDRESS") or ray_place.LOCAL)

    # ---- in the thread

    def _ensure(self) -> Session:
        if self._session is not None and not self._session.lost:
            return self._session
        self._shutdown()
        place = ray_place.choose(self.address, os.environ)
        log.info("Ray: %s (%s)", place.address, place.why)
        if not place.local:
            ray_place.probe(place.address)
        try:
            self._session = self._start_local(place) if place.local else self._join(place)
        except ServerError:
            raise
        except Exception as error:
            log.exception("Ray cannot be started")
            raise ServerError(f"Ray cannot be started: {type(error).__name__}: {error}") from error
        return self._session

    def _start_local(self, place: Place) -> Session:
        temp = ray_place.temp_dir()
        ray_place.prune_sessions(temp)
        settings = {
            "RAY_ADDRESS": None,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_TOKEN_PATH": str(ray_place.token_file(self.home)),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": FOR_EVER,
        }
        with _environment(settings):
            ray = _fresh_ray()
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # in case Ray was imported before us
            ray.init(
                address=ray_place.LOCAL,
                namespace=NAMESPACE,
                _temp_dir=str(temp),
                include_dashboard=False,
                num_cpus=0,  # our actors ask for none, and Ray then keeps no idle workers
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        node = ray._private.worker._global_node
        if node.node_ip_address != "127.0.0.1":
            ray.shutdown()
            raise ServerError(f"Ray listens on {node.node_ip_address} instead of loopback, so it was stopped")
        session = Session(place, _gpus(ray), Path(node.get_logs_dir_path()), guard=_start_guard())
        self._session = session
        processes = psutil.Process().children(recursive=True)
        self.guard(*(process.pid for process in processes if process.pid != _pid(session.guard)))
        for process in processes:
            if process.name() in VITAL:
                watch = threading.Thread(target=_watch, args=(session, process, process.name()), daemon=True)
                watch.start()
        return session

    def _join(self, place: Place) -> Session:
        settings = {
            "RAY_AUTH_MODE": ray_place.auth_mode(os.environ),
            "RAY_gcs_rpc_server_reconnect_timeout_s": FOR_EVER,
        }
        with _environment(settings):
            ray = _fresh_ray()
            ray.init(
                address=place.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
            )
        return Session(place, _gpus(ray), None)

    def _shutdown(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.closing = True
        import ray

        ray.shutdown()
        if session.guard is not None and session.guard.stdin is not None:
            session.guard.stdin.close()
            session.guard.wait()


def _watch(session: Session, process: psutil.Process, name: str) -> None:
    """Wait for the end of a process without which Ray cannot go on."""
    with contextlib.suppress(psutil.Error):
        process.wait()
    if not session.closing and not session.lost:
        session.lost = f"Ray's {name} ended"
        log.error("%s; it is started again with the next worker", session.lost)
        for tell in list(session.watchers):
            tell(session.lost)


def _fresh_ray() -> Any:
    import ray

    if ray.is_initialized():
        raise ServerError("other code in this process has already started Ray; restart the server")
    return ray


def _gpus(ray: Any) -> float:
    return float(ray.cluster_resources().get("GPU", 0))


def _pid(process: subprocess.Popen[str] | None) -> int | None:
    return process.pid if process else None


def _start_guard() -> subprocess.Popen[str]:
    """In a session of its own: a Ctrl-C in the terminal must not end it before us."""
    return subprocess.Popen(
        [sys.executable, reaper.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def _keep_signal_handler() -> None:
    """Put back the SIGTERM handler that Ray's native code laid itself over."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Variables for Ray's processes, taken back at once: kernels that start later must not inherit them."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _apply(changes)
        yield
    finally:
        _apply(before)


def _apply(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
