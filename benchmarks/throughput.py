"""Trained tokens per CPU-second of the whole server tree (Jupyter, Ray, workers) at 8 x 256 tokens.

The plain loop takes turns with the served one; its CPU-seconds are those of its own process while it runs. What counts
is the median over the turns of the ratio. They begin when both are warm and the standby worker is there: it imports
its libraries once, which has a line of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from operator import truediv
from statistics import median

import psutil
from common import (
    PlainLoop,
    Row,
    SdkLoop,
    cpu_seconds,
    held,
    owners_client,
    same_start,
    server,
    show,
    spare,
    tokens_of,
    trainer_threads,
)

ROWS, LENGTH = 8, 256
WARM, ROUNDS, STEPS = 3, 7, 5


def measure() -> list[Row]:
    rows = tokens_of(ROWS, LENGTH)
    with server() as started, owners_client(started) as client:
        served = SdkLoop(client, rows)
        plain = PlainLoop(rows, trainer_threads())
        same_start(plain.step(), served.step())
        once = psutil.Process(spare(started)).cpu_times()
        for _ in range(WARM):  # until neither needs more memory
            plain.step()
            served.step()
        ours, theirs = [], []
        for _ in range(ROUNDS):
            theirs.append(cost(plain.step, time.process_time))
            ours.append(cost(served.step, lambda: cpu_seconds(started.pid)))
    tokens = STEPS * ROWS * LENGTH
    plain_cpu, plain_wall = zip(*theirs, strict=True)
    served_cpu, served_wall = zip(*ours, strict=True)
    return [
        Row(
            f"plain PEFT, {ROWS} x {LENGTH} tokens",
            f"{tokens / median(plain_cpu):.0f} tokens/CPU-s",
        ),
        Row(
            f"server tree, {ROWS} x {LENGTH} tokens",
            f"{tokens / median(served_cpu):.0f} tokens/CPU-s",
        ),
        held("throughput", median(map(truediv, plain_cpu, served_cpu))),
        Row("standby worker, once after the start", f"{once.user + once.system:.1f} CPU-s"),
        Row("served / plain, per second", f"{median(map(truediv, plain_wall, served_wall)):.2f} x"),
    ]


def cost(step: Callable[[], object], cpu: Callable[[], float]) -> tuple[float, float]:
    """CPU-seconds and seconds of some steps."""
    began, at = cpu(), time.perf_counter()
    for _ in range(STEPS):
        step()
    return cpu() - began, time.perf_counter() - at


if __name__ == "__main__":
    sys.exit(not show(measure()))
