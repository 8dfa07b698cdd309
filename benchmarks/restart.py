"""How long training stands still when the trainer is killed: from ``kill -9`` to the next answer of its run."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time

import psutil
from common import Row, SdkLoop, held, owners_client, server, show, spare, tokens_of, tree

ROUNDS = 3


def measure() -> list[Row]:
    with server() as started, owners_client(started) as client:
        loop = SdkLoop(client, tokens_of(1, 16))
        loop.step()
        seconds = []
        for _ in range(ROUNDS):
            os.kill(trainer(started.pid, spare(started)), signal.SIGKILL)
            began = time.perf_counter()
            loop.step()
            seconds.append(time.perf_counter() - began)
    return [held("restart", statistics.median(seconds))]


def trainer(server_pid: int, standby: int) -> int:
    """The process that trains."""
    for process in tree(server_pid):
        with contextlib.suppress(psutil.Error):
            if process.pid != standby and "TrainingActor" in " ".join(process.cmdline()):
                return process.pid
    raise SystemExit("there is no trainer to kill")


if __name__ == "__main__":
    sys.exit(not show(measure()))
