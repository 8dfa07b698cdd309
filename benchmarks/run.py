"""``make bench``: every benchmark in turn, one table. Ends with 1 if a mark is missed.

A busy machine measures itself: the load is shown with the figures.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import import_module
from importlib.metadata import version

from common import Row, in_a_process, show, trainer_threads

PARTS = (
    "tenants",
    "throughput",
    "scaling",
    "decode",
    "beside_vllm",
    "fairness",
    "hand_over",
    "restart",
    "step_latency",
    "server_cost",
    "protocol",
    "journal",
)


def main() -> int:
    before, began = os.getloadavg()[0], time.perf_counter()
    rows: list[Row] = []
    for part in PARTS:
        started = time.perf_counter()
        try:
            rows += in_a_process(measured, part)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one part does not hide the others
            rows.append(Row(part, f"failed: {error}", ok=False))
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "ray", "tinker")
    )
    print(
        f"{os.cpu_count()} CPUs, trainer threads {trainer_threads()}, Python {platform.python_version()}, {packages}"
    )
    print(
        f"load average at the start {before:.1f}, {time.perf_counter() - began:.0f} s in all; "
        "figures on a busy machine say little\n"
    )
    return not show(rows)


def measured(part: str) -> list[Row]:
    found: list[Row] = import_module(part).measure()
    return found


if __name__ == "__main__":
    sys.exit(main())
