"""Trained tokens per CPU-second of the whole server tree (Jupyter, Ray, workers) at 8 x 256 tokens.

The plain loop takes turns with the served one; its CPU-seconds are those of its own process while it runs. Turns begin
when the standby worker is there: it imports its libraries once, which has a line of its own.
"""

from __future__ import annotations

import sys
import time

import psutil
from common import (
    PlainLoop,
    Row,
    SdkLoop,
    cpu_seconds,
    held,
    same_start,
    server,
    service_client,
    show,
    tokens_of,
    trainer_threads,
)

from tests.support.live import key_of, standby

ROWS, LENGTH = 8, 256
ROUNDS, STEPS = 6, 5


def measure() -> list[Row]:
    rows = tokens_of(ROWS, LENGTH)
    with server() as started:
        client = service_client(started)
        served = SdkLoop(client, rows)
        plain = PlainLoop(rows, trainer_threads())
        same_start(plain.step(), served.step())
        spare = psutil.Process(standby(f"{started.url}tuft", key_of(started.work))).cpu_times()
        plain_cpu = served_cpu = plain_wall = served_wall = 0.0
        for _ in range(ROUNDS):
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(STEPS):
                plain.step()
            plain_cpu, plain_wall = (
                plain_cpu + time.process_time() - cpu,
                plain_wall + time.perf_counter() - wall,
            )
            cpu, wall = cpu_seconds(started.pid), time.perf_counter()
            for _ in range(STEPS):
                served.step()
            served_cpu += cpu_seconds(started.pid) - cpu
            served_wall += time.perf_counter() - wall
        client.close("success").result()
    tokens = ROUNDS * STEPS * ROWS * LENGTH
    return [
        Row(f"plain PEFT, {ROWS} x {LENGTH} tokens", f"{tokens / plain_cpu:.0f} tokens/CPU-s"),
        Row(f"server tree, {ROWS} x {LENGTH} tokens", f"{tokens / served_cpu:.0f} tokens/CPU-s"),
        held("throughput", plain_cpu / served_cpu),
        Row("standby worker, once after the start", f"{spare.user + spare.system:.1f} CPU-s"),
        Row("served / plain, per second", f"{plain_wall / served_wall:.2f} x"),
    ]


if __name__ == "__main__":
    sys.exit(not show(measure()))
