"""How long one small training step takes: one datum of 16 tokens, through SDK, Jupyter server and Ray.

The plain loop runs between the served steps, so both see the same machine.
"""

from __future__ import annotations

import sys
import time

from common import (
    PlainLoop,
    Row,
    SdkLoop,
    at_most,
    median_ms,
    owners_client,
    same_start,
    server,
    show,
    spare,
    tokens_of,
    trainer_threads,
)

CALLS = 30
WARM = 5
TOKENS = 16
RATIO = 1.5
AROUND = (
    "1.11 to 1.53 x in ten quiet runs. Client, server and trainer are awake at once, on two cores here: whatever "
    "else runs weighs more than on the plain loop. Of the 13 ms around the trainer 9 are the SDK's own"
)


def measure() -> list[Row]:
    rows = tokens_of(1, TOKENS)
    with server() as started, owners_client(started) as client:
        served = SdkLoop(client, rows)
        plain = PlainLoop(rows, trainer_threads())
        same_start(plain.step(), served.step())
        spare(started)
        times: dict[str, list[float]] = {"plain": [], "served": []}
        for _ in range(WARM + CALLS):
            for name, loop in (("plain", plain), ("served", served)):
                began = time.perf_counter()
                loop.step()
                times[name].append(time.perf_counter() - began)
    plain_ms, served_ms = (median_ms(times[name][WARM:]) for name in ("plain", "served"))
    return [
        Row(f"plain PEFT step, 1 x {TOKENS} tokens, median of {CALLS}", f"{plain_ms:.1f} ms"),
        Row(f"served step, 1 x {TOKENS} tokens, median of {CALLS}", f"{served_ms:.1f} ms"),
        at_most("served step / plain step", served_ms / plain_ms, RATIO, " x", note=AROUND),
    ]


if __name__ == "__main__":
    sys.exit(not show(measure()))
