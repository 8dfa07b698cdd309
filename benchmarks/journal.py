"""What the journal costs a training step: does a step get dearer as the journal grows, and against one in memory.

The first is measured on the ledger alone, with four records per step as a step makes them and bodies of 8 KB; the
second through the SDK, on two servers in turn, because that is what a user waits for.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Row, SdkLoop, at_most, median_ms, owners_client, server, show, tokens_of

STEPS = 10_000
PART = 1000
ROUNDS, CALLS = 4, 15
FLAT, DEARER = 1.3, 1.3
CONFIG = "supported_models: [{model_name: tuft/demo, max_lora_rank: 64}]\n"


async def grown(path: Path) -> list[float]:
    """Seconds of each of many steps on one ledger, with the maintenance that a server does."""
    from tuft_jupyter.core.journal_sqlite import SqliteJournal
    from tuft_jupyter.core.ledger import Ledger

    ledger = Ledger(SqliteJournal(path))
    await ledger.open()
    lora = {"rank": 8, "alpha": 32.0, "seed": 1}
    args = {"session": "s", "base_model": "tuft/demo", "lora": lora}
    await ledger.record("session_opened", "alice", {"session": "s"})
    await op(ledger, "create_model", 0, b"", args, {})
    seconds = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        await op(ledger, "forward_backward", 2 * step, bytes(8192), {}, {"loss_sum": 2.5, "weight_sum": 1.0})
        await op(
            ledger, "optim_step", 2 * step + 1, b"", {"adam": {"learning_rate": 1e-4}}, {"grad_norm": 1.0}
        )
        seconds.append(time.perf_counter() - began)
        if step % 20 == 0:
            covered = list(ledger.state.runs["s:train:0"].replay)
            snapshot = {"run": "s:train:0", "directory": "d", "covers": covered[-1]}
            await ledger.record("run_snapshot", "alice", snapshot)
            await ledger.journal.drop_blobs(covered)
        if step % 200 == 0:
            await ledger.tidy()
    await ledger.close()
    return seconds


async def op(
    ledger: Any, kind: str, seq: int, body: bytes, args: dict[str, Any], facts: dict[str, Any]
) -> None:
    """One op as it is accepted and done."""
    name = f"{seq:032x}"
    told = {"request_id": name, "run": "s:train:0", "seq": seq, "op": kind}
    accepted = {**told, "tokens": 64, "digest": f"{seq:064x}", "args": args, "content_type": "x"}
    await ledger.record("op_accepted", "alice", accepted, body)
    await ledger.record("op_done", "alice", {**told, "facts": facts, "content_type": "x"}, bytes(2048))


def through_the_sdk() -> tuple[list[float], list[float]]:
    """Seconds of a step with the journal in a file, and in memory."""
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        config = Path(scratch) / "tuft.yaml"
        config.write_text(CONFIG)  # no persistence section: in memory
        with (
            server() as kept,
            server(TUFT_CONFIG=str(config)) as forgetful,
            owners_client(kept) as a,
            owners_client(forgetful) as b,
        ):
            loops = [SdkLoop(client, tokens_of(4, 64)) for client in (a, b)]
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for loop, told in zip(loops, seconds, strict=True):
                    loop.step()
                    for _ in range(CALLS):
                        began = time.perf_counter()
                        loop.step()
                        told.append(time.perf_counter() - began)
    return seconds


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        path = Path(scratch) / "journal.sqlite"
        seconds = asyncio.run(grown(path))
        megabytes = path.stat().st_size / 2**20
    first, last = statistics.median(seconds[:PART]), statistics.median(seconds[-PART:])
    file, memory = through_the_sdk()
    return [
        Row("journal records of a step, first / last thousand", f"{first * 1e3:.2f} / {last * 1e3:.2f} ms"),
        at_most("last thousand of ten thousand / first", last / first, FLAT, " x"),
        Row("the file after ten thousand steps", f"{megabytes:.1f} MB"),
        at_most("step with the file / in memory, medians", median_ms(file) / median_ms(memory), DEARER, " x"),
    ]


if __name__ == "__main__":
    sys.exit(not show(measure()))
