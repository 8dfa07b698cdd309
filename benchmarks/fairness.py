"""How long a light tenant waits beside a heavy one: 1 x 16 tokens beside 32 x 256 tokens, three deep.

The light tenant's steps are timed alone and beside, in turn, against the same server. The heavy tenant is a process of
its own, as people are: in one process the two clients would wait for each other's interpreter.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import (
    MODEL,
    RANK,
    Row,
    SdkLoop,
    api_of,
    held,
    median_ms,
    quantile,
    sdk,
    sdk_data,
    server,
    show,
    spare,
    tokens_of,
)

ROUNDS = 3
CALLS = 12
DEPTH = 3
LIGHT, HEAVY = "tml-light", "tml-heavy"
CONFIG = f"""
supported_models: [{{model_name: tuft/demo, max_lora_rank: 64}}]
authorized_users: {{{LIGHT}: light, {HEAVY}: heavy}}
persistence: {{mode: file_redis, file_path: journal.sqlite}}
"""


def be_heavy(url: str) -> None:
    """Keep ``DEPTH`` large batches queued until the standard input ends; say so once they are."""
    from tinker import types

    data, adam = sdk_data(tokens_of(32, 256)), types.AdamParams(learning_rate=1e-4)
    queued: list[Any] = []
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    with sdk(api_of(url), HEAVY) as client:
        training = client.create_lora_training_client(base_model=MODEL, rank=RANK, seed=2).result()
        while not stop.is_set():
            while len(queued) < DEPTH:
                queued.append((training.forward_backward(data, "cross_entropy"), training.optim_step(adam)))
            for future in queued.pop(0):
                future.result()
            print("busy", flush=True)
        for pair in queued:
            for future in pair:
                future.result()


@contextlib.contextmanager
def heavy_tenant(url: str) -> Iterator[None]:
    """Another user's process, with its queue full."""
    command = [sys.executable, __file__, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        yield
        process.stdin.close()
        process.stdout.read()


def timed(step: Callable[[], object], calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        config = Path(scratch) / "tuft.yaml"
        config.write_text(CONFIG)
        with (
            server(TUFT_CONFIG=str(config)) as started,
            sdk(api_of(started.url), LIGHT) as client,
        ):
            light = SdkLoop(client, tokens_of(1, 16))
            timed(light.step, CALLS)
            spare(started, LIGHT)
            alone: list[float] = []
            beside: list[float] = []
            for _ in range(ROUNDS):
                alone += timed(light.step, CALLS)
                with heavy_tenant(started.url):
                    beside += timed(light.step, CALLS)
    return [
        Row(
            "light tenant alone, median / p95",
            f"{median_ms(alone):.0f} / {quantile(alone, 0.95) * 1e3:.0f} ms",
        ),
        Row(
            "beside a heavy one, median / p95",
            f"{median_ms(beside):.0f} / {quantile(beside, 0.95) * 1e3:.0f} ms",
        ),
        held("fairness", median_ms(beside) / median_ms(alone)),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        be_heavy(sys.argv[1])
    else:
        sys.exit(not show(measure()))
