"""kill -9 of the training worker, of the server, of both: a real Jupyter server, real Ray, the stock SDK, tuft/demo.

Every trial trains a new run with the same seeds, and kills at a random moment of it. The client does not know. At the
end its final weights and Adam's moments must be, bit by bit, those of the run that nothing happened to.

At most one pass is under way at a time: passes that wait together may share one batch, whose sums round differently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
from tinker import types

from examples.run_on_server import Server
from tests.fault.bench import Fault, Trial
from tests.support.live import OURS, ask, below, environment, key_of, sdk, standby

STEPS = 12


class Bench:
    """A server that can be killed and comes back at its address, and a client that trains on it."""

    def __init__(self, home: Path) -> None:
        (home / "root").mkdir()
        for name in [name for name in os.environ if name.startswith(OURS)]:
            del os.environ[name]
        os.environ["TINKER_TELEMETRY"] = "0"
        env = environment(home, TUFT_TRAINER_THREADS="1", TUFT_STANDBY_WORKER="true")
        self.spare = 0
        self.home = home
        self.server = Server(home / "root", home, base_url="/user/alice/", env=env, port=free_port())
        self._clients = contextlib.ExitStack()

    def start(self) -> None:
        self.server.start()
        self.service = self._clients.enter_context(sdk(f"{self.server.url}tuft", key_of(self.home)))
        self.train()  # brings the worker up
        began = time.monotonic()
        path = self.train()
        self.seconds = time.monotonic() - began
        self.calm = self.look(path)

    def stop(self) -> None:
        self._clients.close()
        self.server.stop()

    def train(self) -> str:
        """Train a new run to its end with the stock SDK; the path of its last checkpoint."""
        rng = random.Random(0)
        training = self.service.create_lora_training_client(base_model="tuft/demo", rank=4, seed=3).result()
        for _ in range(STEPS):
            training.forward_backward(batch(rng), "cross_entropy").result()
            second: Any = training.forward_backward(batch(rng), "cross_entropy")
            stepped: Any = training.optim_step(types.AdamParams(learning_rate=1e-3))
            second.result()
            stepped.result()
        path: str = training.save_state("final").result().path
        return path

    def look(self, path: str) -> tuple[str, str, int, int]:
        """(hash of the adapter, hash of the moments, steps, tokens) of that run, as the server has them."""
        ask(
            f"{self.server.url}tuft", "training_runs", key_of(self.home)
        )  # answered when the journal was read
        state = self.server.request("GET", "tuft/lab/state")["state"]
        (run,) = [each for each in state["runs"] if each["id"] == path.split("/")[2]]
        assert run["pending"] == 0
        assert run["step"] == len(run["curve"]["loss"])
        newest = max((self.home / "tuft" / "checkpoints").iterdir(), key=lambda each: each.stat().st_mtime)
        return digest(newest, "adapter_model"), digest(newest, "optimizer"), run["step"], run["tokens"]

    def kill_worker(self) -> None:
        with contextlib.suppress(psutil.Error):
            for worker in below(self.server.pid, "TrainingActor"):
                if worker.pid != self.spare:
                    worker.kill()

    def kill_server(self) -> None:
        self.server.kill()
        self.server.start()


def free_port() -> int:
    """One that the system gives to nobody while the server is dead: below the range of those it chooses itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def digest(checkpoint: Path, name: str) -> str:
    return hashlib.sha256((checkpoint / f"{name}.safetensors").read_bytes()).hexdigest()


def batch(rng: Random) -> list[types.Datum]:
    data = []
    for _ in range(2):
        ids = [rng.randrange(300, 2000) for _ in range(rng.randrange(6, 24))]
        targets = types.TensorData(data=ids[1:], dtype="int64", shape=[len(ids) - 1])
        model_input = types.ModelInput.from_ints(ids[:-1])
        data.append(types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets}))
    return data


def killing(
    blows: Callable[[Bench, Random], None], spared: bool = False
) -> Callable[[Path], contextlib.AbstractContextManager[Trial]]:
    @contextlib.contextmanager
    def bench(home: Path) -> Iterator[Trial]:
        made = Bench(home)
        try:
            made.start()
            yield lambda rng: trial(made, rng)
        finally:
            made.stop()

    def trial(made: Bench, rng: Random) -> str:
        while True:
            made.spare = standby(f"{made.server.url}tuft", key_of(made.home)) if spared else 0
            struck, seconds = strike(made, rng)
            if struck:
                return f"{max(0.0, seconds - made.seconds):.1f}"
            made.seconds = min(made.seconds, seconds)  # the machine was busier when that was measured

    def strike(made: Bench, rng: Random) -> tuple[bool, float]:
        """Whether the blow fell while the run was trained, and the seconds that took."""
        moment = rng.uniform(0.0, made.seconds)
        failed: list[Exception] = []
        fell: list[float] = []

        def blow() -> None:
            try:
                time.sleep(moment)
                fell.append(time.monotonic())
                blows(made, rng)
            except Exception as error:  # noqa: BLE001 - told to the trial
                failed.append(error)

        striking = threading.Thread(target=blow)
        striking.start()
        began = time.monotonic()
        path = made.train()
        ended = time.monotonic()
        striking.join()
        assert not failed, failed
        seen = made.look(path)
        assert seen == made.calm, (
            f"{json.dumps(seen)} is not {json.dumps(made.calm)}, killed after {moment:.2f} s"
        )
        return fell[0] < ended, ended - began

    return bench


def both(made: Bench, rng: Random) -> None:
    """The worker and the server, then one of them again while the run is being rebuilt."""
    made.kill_worker()
    time.sleep(rng.uniform(0.0, 0.3))
    made.kill_server()
    time.sleep(rng.uniform(0.0, 4.0))
    rng.choice([made.kill_worker, made.kill_server])()


HOLDS = (
    "no acknowledged step lost, none applied twice; adapter and Adam equal the undisturbed run's bit by bit"
)
FAULTS = [
    Fault(
        "F1",
        "kill -9 of the training worker",
        HOLDS,
        killing(lambda made, rng: made.kill_worker(), spared=True),
    ),
    Fault("F2", "kill -9 of the server", HOLDS, killing(lambda made, rng: made.kill_server())),
    Fault("F3", "kill -9 of both, and again during recovery", HOLDS, killing(both)),
]
