"""Stopping a training loop where a step ends: Kernel > Interrupt waits for the step, and no request is left behind.

A loop is code of the user's, and the SDK is the SDK as it was shipped: nothing of either is changed. An interrupt is
handled in the main thread, so while it is handled the loop makes no further request. The handler lets what is on its
way arrive and what arrived be answered, and asks the server whether gradients wait for an optimizer step. If none do,
the loop is stopped there. Otherwise it goes on, and is looked at again after its next request. The third interrupt
stops it wherever it is, as an interrupt of Python does.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

from tuft_jupyter.kernel.client import Refused, Unreachable
from tuft_jupyter.kernel.errors import TuftConnectionError

INSIST = 3
"""The interrupt that is obeyed at once, in the middle of a step."""
GLANCE = 0.01
"""Seconds between two looks at the SDK's counters."""
STUCK = 0.3
"""Seconds after which a request that does not leave is taken to wait for the loop, which is held up meanwhile."""

Tell = Callable[[str], None]
Runs = Callable[[], Sequence[dict[str, Any]]]


class Stopped(KeyboardInterrupt):
    """The loop was stopped on purpose. In a notebook it shows as its message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self) or "Stopped."]


class Stopping:
    """Stops what runs in a ``with`` block where a step ends, once it was interrupted.

    ``runs`` asks the server for the caller's runs, ``tell`` is told in a sentence what an interrupt waits for. It works
    in the main thread; elsewhere no signal arrives and the block runs as it is.
    """

    def __init__(self, runs: Runs, tell: Tell) -> None:
        self.asked = 0
        self._runs = runs
        self._tell = tell
        self._clients: dict[int, tuple[Any, int]] = {}
        self._searched = 0.0
        self._deciding = False
        self._watcher: threading.Thread | None = None
        self._again = False
        self._over = False
        self._ending = threading.Lock()
        self._before: Any = None

    def __enter__(self) -> Self:
        self._clients = {id(client): (client, made(client)) for client in training_clients()}
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        with self._ending:  # from here on the watcher interrupts nobody
            if self._before is not None:
                signal.signal(signal.SIGINT, self._before)

    def used(self, age: float = 0.0) -> list[Any]:
        """The training clients that made a request since the block began; new ones are found within ``age`` seconds."""
        if time.monotonic() - self._searched >= age:
            for client in training_clients():
                self._clients.setdefault(id(client), (client, 0))
            self._searched = time.monotonic()
        return [client for client, before in list(self._clients.values()) if made(client) != before]

    def trained(self, clients: Sequence[Any]) -> list[dict[str, Any]]:
        """What the server says of these clients' runs."""
        ids = {client.model_id for client in clients}
        return [run for run in self._runs() if run["id"] in ids] if ids else []

    def settle(self, clients: Sequence[Any], patience: float) -> bool:
        """Wait until every request is answered; False if for ``patience`` seconds none left that has to."""
        told, moved, counts = False, time.monotonic(), _counts(clients)
        while True:
            if not any(on_its_way(client) for client in clients):
                waiting = sum(run["pending"] for run in self.trained(clients))
                if not waiting:
                    return True
                if not told:
                    self._tell(f"waiting for the answers to {waiting} requests ...")
                    told = True
            elif _counts(clients) != counts:
                moved, counts = time.monotonic(), _counts(clients)
            elif time.monotonic() - moved > patience:
                return False
            time.sleep(GLANCE)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return
        self.asked += not self._again
        self._again = False
        if self.asked >= INSIST:
            raise Stopped
        if self._deciding:
            return  # a second interrupt, while the first one waits
        self._deciding = True
        try:
            clients = self.used()
            counts = _counts(clients)
            stop = self._between_steps(clients)
        except (Refused, Unreachable, TuftConnectionError):
            stop = True  # nobody can tell where a step ends; whoever asks for the runs next hears why
        finally:
            self._deciding = False
        if stop:
            raise Stopped
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._look_again, args=(clients, counts), daemon=True)
            self._watcher.start()

    def _between_steps(self, clients: Sequence[Any]) -> bool:
        """Whether every request is answered and every gradient has had its optimizer step."""
        if not self.settle(clients, STUCK):
            return False
        if any(run["passes"] for run in self.trained(clients)):
            self._tell("the loop stops after this step; it waits for its optimizer step ...")
            return False
        return True

    def _look_again(self, clients: Sequence[Any], counts: list[tuple[int, int]]) -> None:
        """Interrupt the loop once more when it has made another request, or at once where one was stuck."""
        stuck = any(on_its_way(client) for client in clients)
        while not self._over:
            time.sleep(GLANCE)
            if stuck or _counts(clients) != counts:
                with self._ending:
                    if not self._over:
                        self._again = True
                        _interrupt_main()
                return


def training_clients() -> list[Any]:
    """Every training client of the SDK in this process, whoever made it; not the futures that stand in for one."""
    module = sys.modules.get("tinker.lib.public_interfaces.training_client")
    if module is None:
        return []
    kinds = {module.TrainingClient, *module.TrainingClient.__subclasses__()}
    objects = [found for found in gc.get_objects() if type(found) in kinds]
    # SDK 0.38's future of a client is of a subclass too, and counts nothing itself; nor does a client half made.
    return [found for found in objects if "_turn_counter" in vars(found)]


def made(client: Any) -> int:
    """How many requests a training client has numbered (SDK 0.16 to 0.38)."""
    return int(client._request_id_counter)


def on_its_way(client: Any) -> bool:
    """Whether a request is numbered that the server has not accepted or refused yet (SDK 0.16 to 0.38)."""
    return bool(client._turn_counter < client._request_id_counter)


def _counts(clients: Sequence[Any]) -> list[tuple[int, int]]:
    return [(client._request_id_counter, client._turn_counter) for client in clients]


def _interrupt_main() -> None:
    """Signal the main thread, also where it sleeps or waits; where a platform cannot, it notices when it is awake."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
