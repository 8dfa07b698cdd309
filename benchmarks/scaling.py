"""Tokens per CPU-second of the whole server tree with 64 tenants over those with one: many tenants must not cost more.

Every tenant has a key, a run and a batch of 2 x 128 tokens of its own, and all of them train at once.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Row, SdkLoop, api_of, cpu_seconds, held, sdk, server, show, tokens_of

TENANTS = 64
ROWS, LENGTH = 2, 128
ROUNDS = 4
STEPS_ALONE = 24
STEPS_TOGETHER = 2


def measure() -> list[Row]:
    keys = [f"tml-tenant{i}" for i in range(TENANTS)]
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        config = Path(scratch) / "tuft.yaml"
        users = ", ".join(f"{key}: {key[4:]}" for key in keys)
        config.write_text(
            "supported_models: [{model_name: tuft/demo, max_lora_rank: 64}]\n"
            f"authorized_users: {{{users}}}\n"
            "persistence: {mode: file_redis, file_path: journal.sqlite}\n"
        )
        with server(TUFT_CONFIG=str(config)) as started, contextlib.ExitStack() as open_ones:
            api = api_of(started.url)
            clients = [open_ones.enter_context(sdk(api, key)) for key in keys]
            loops = [SdkLoop(one, tokens_of(ROWS, LENGTH)) for one in clients]
            train(loops)
            alone, together = [], []
            for _ in range(ROUNDS):
                began = cpu_seconds(started.pid)
                for _ in range(STEPS_ALONE):
                    train(loops[:1])
                alone.append(STEPS_ALONE * ROWS * LENGTH / (cpu_seconds(started.pid) - began))
                began = cpu_seconds(started.pid)
                for _ in range(STEPS_TOGETHER):
                    train(loops)
                together.append(STEPS_TOGETHER * TENANTS * ROWS * LENGTH / (cpu_seconds(started.pid) - began))
    what = f"server tree, {ROWS} x {LENGTH} tokens each"
    return [
        Row(f"{what}: 1 tenant", f"{statistics.median(alone):.0f} tokens/CPU-s"),
        Row(f"{what}: {TENANTS} tenants", f"{statistics.median(together):.0f} tokens/CPU-s"),
        held("scaling", statistics.median(b / a for a, b in zip(alone, together, strict=True))),
    ]


def train(loops: Sequence[SdkLoop]) -> None:
    """One step of all, sent together."""
    for answers in [loop.send() for loop in loops]:
        for answer in answers:
            answer.result()


if __name__ == "__main__":
    sys.exit(not show(measure()))
