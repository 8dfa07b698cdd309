"""``make bench``: every benchmark in turn, one table. Ends with 1 if a mark is missed.

A busy machine measures itself: the load is shown with the figures.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version

import decode
import fairness
import hand_over
import journal
import protocol
import scaling
import server_cost
import step_latency
import tenants
import throughput
from common import show, trainer_threads


def main() -> int:
    before = os.getloadavg()[0]
    rows = [
        row
        for part in (
            tenants,
            decode,
            step_latency,
            throughput,
            scaling,
            hand_over,
            server_cost,
            protocol,
            fairness,
            journal,
        )
        for row in part.measure()
    ]
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "ray", "tinker")
    )
    print(
        f"{os.cpu_count()} CPUs, trainer threads {trainer_threads()}, Python {platform.python_version()}, {packages}"
    )
    print(f"load average at the start {before:.1f}; figures on a busy machine say little\n")
    return not show(rows)


if __name__ == "__main__":
    sys.exit(main())
