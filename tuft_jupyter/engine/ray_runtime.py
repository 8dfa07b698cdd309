"""Ray in this process: started once, off the event loop, watched, and gone with its last user.

What has been measured with Ray 2.60 and is guarded against here:

* ``ray.init`` and the first actor block for seconds: everything that starts or ends Ray runs in one thread. The
  kernel kills Ray's processes when the *thread* that made them ends (``PR_SET_PDEATHSIG``), so it never does.
* Ray learns of the death of its own GCS or raylet after a minute or never: they are watched here, and whoever waits
  is told at once.
* Ray takes over SIGTERM; the handler that was there is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import ray_local, ray_place
from tuft_jupyter.engine.ray_place import Place

log = logging.getLogger(__name__)

T = TypeVar("T")

JOIN_SECONDS = 30.0


class RayThread:
    """One daemon thread that runs what it is given, in order, for as long as the process lives."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="ray", daemon=True).start()

    async def run(self, job: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return await asyncio.wrap_future(future)

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
    logs: Path | None = None
    guard: ray_local.Guard | None = None
    lost: str = ""
    closing: bool = False
    watchers: set[Callable[[str], None]] = field(default_factory=set)


class Runtime:
    """Ray for this process. ``users`` keep it up; when the last is gone it is shut down.

    ``namespace`` keeps the names of our actors apart from those of other servers on the same cluster.
    """

    def __init__(self, home: Path, address: str | None, namespace: str = "tuft_cluster") -> None:
        self.home = home
        self.address = address
        self.namespace = namespace
        self.thread = RayThread()
        self._session: Session | None = None
        self._users: set[object] = set()

    @property
    def running(self) -> bool:
        return self.session is not None

    @property
    def session(self) -> Session | None:
        """The Ray that is up; None while there is none."""
        return None if self._session is None or self._session.lost else self._session

    async def acquire(self, user: object) -> Session:
        """Ray, started if need be, for as long as ``user`` does not release it; ServerError says why it cannot be."""
        self._users.add(user)
        asked = ray_place.asked(self.address, os.environ)
        try:
            seconds = None if asked.local else JOIN_SECONDS
            session = await asyncio.wait_for(self.thread.run(self._ensure), seconds)
        except TimeoutError:
            raise ServerError(
                f"the Ray cluster at {asked.address!r} did not answer within {JOIN_SECONDS:g} s"
            ) from None
        _keep_signal_handler()
        return session

    async def release(self, user: object) -> None:
        self._users.discard(user)
        await self.thread.run(lambda: None if self._users else self._shutdown())

    # ---- in the thread

    def _ensure(self) -> Session:
        if self._session is not None and not self._session.lost:
            if not self._session.place.local:
                self._session.gpus = _gpus()  # nodes come and go
            return self._session
        self._shutdown()
        place = ray_place.choose(self.address, os.environ)
        log.info("Ray: %s (%s)", place.address, place.why)
        if not place.local:
            ray_place.probe(place.address)
        try:
            self._session = self._start(place) if place.local else self._join(place)
        except ServerError:
            raise
        except Exception as error:
            log.exception("Ray cannot be started")
            raise ServerError(f"Ray cannot be started: {type(error).__name__}: {error}") from error
        return self._session

    def _start(self, place: Place) -> Session:
        guard = ray_local.Guard()
        guard.watch_sessions(ray_place.own_sessions())  # first: we may be killed while Ray starts
        try:
            node, temp = ray_local.start(self.home, self.namespace)
        except BaseException:
            guard.close()
            raise
        session = Session(place, _gpus(), Path(node.get_logs_dir_path()), guard)
        for process in ray_local.processes(temp):
            guard.watch(process)
            if process.name() in ray_local.VITAL:
                watch = threading.Thread(target=_watch, args=(session, process, process.name()), daemon=True)
                watch.start()
        return session

    def _join(self, place: Place) -> Session:
        settings = {"RAY_AUTH_MODE": ray_place.auth_mode(os.environ), **ray_local.PATIENT}
        with ray_local.environment(settings):
            ray_local.import_ray().init(
                address=place.address,
                namespace=self.namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        return Session(place, _gpus())

    def _shutdown(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.closing = True
        import ray

        ray.shutdown()
        if session.guard is not None:
            session.guard.close()


def _gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def _watch(session: Session, process: psutil.Process, name: str) -> None:
    """Wait for the end of a process without which Ray cannot go on."""
    with contextlib.suppress(psutil.Error):
        process.wait()
    if not session.closing and not session.lost:
        session.lost = f"Ray's {name} ended"
        log.error("%s; it is started again with the next worker", session.lost)
        for tell in list(session.watchers):
            tell(session.lost)


def _keep_signal_handler() -> None:
    """Put back the SIGTERM handler that Ray's native code laid itself over."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
