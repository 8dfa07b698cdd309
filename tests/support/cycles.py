"""What stays behind when many clients come, train, sample and go, at a real Jupyter server: ``make cycles``.

A cycle is a whole visit over plain HTTP: session, run, pass, step, weights for a sampler, a sample, unload, end. What
is told of sessions and runs for good (the panel lists them) takes a few kilobytes each; nothing else may grow.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from examples.run_on_server import Server
from tests.support.live import below, environment, key_of
from tests.support.load import Client
from tuft_jupyter.core.types import PROTOBUF

CYCLES, WARM, AT_ONCE = 1000, 60, 4
KB_PER_CYCLE = 32.0
"""What a visit may leave in the server's memory: what is on record of it for good, and for ten minutes its answers."""
WORKER_MB = 40.0
"""Noise of an allocator; an adapter of the demo model with its gradients and moments takes 1.4."""
SWEPT_SECONDS = 20.0
"""After this long the server's maintenance has been through."""


@dataclass(frozen=True, slots=True)
class Kept:
    """``rss_mb`` of the server and of each worker; descriptors and threads of the server; directories of weights."""

    rss_mb: float
    trainer_mb: float
    sampler_mb: float
    descriptors: int
    threads: int
    directories: int


def kept(server: Server, home: Path) -> Kept:
    process = psutil.Process(server.pid)
    workers = {"TrainingActor": 0.0, "SamplingActor": 0.0}
    for name in workers:
        for worker in below(server.pid, name):
            workers[name] = worker.memory_info().rss / 1e6
    weights = [each for place in ("snapshots", "ephemeral") for each in (home / "tuft" / place).glob("*")]
    return Kept(
        process.memory_info().rss / 1e6,
        workers["TrainingActor"],
        workers["SamplingActor"],
        process.num_fds(),
        process.num_threads(),
        len(weights),
    )


async def visit(client: Client) -> None:
    session = (await client.told("create_session", {"tags": ["cycle"]}))["session_id"]
    asked = {"session_id": session, "model_seq_id": 0, "base_model": "tuft/demo", "lora_config": {"rank": 8}}
    run = f"{session}:train:0"
    await done(client, await client.told("create_model", asked))
    passed = await client.told("forward_backward", client.passed(run, 1, 32), PROTOBUF)
    client.seq += 2
    stepped = await client.told(
        "optim_step", {"model_id": run, "seq_id": client.seq, "adam_params": {"learning_rate": 1e-4}}
    )
    saving = {"model_id": run, "seq_id": client.seq + 1, "sampling_session_seq_id": 0}
    saved = await client.told("save_weights_for_sampler", saving)
    for promise in (passed, stepped, saved):
        await done(client, promise)
    sample = {
        "sampling_session_id": f"{session}:sample:0",
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7, 8, 9]}]},
        "sampling_params": {"max_tokens": 2},
    }
    await done(client, await client.told("asample", sample))
    await done(client, await client.told("unload_model", {"model_id": run}))
    await client.told(f"sessions/{session}/finish", {"reason": {"type": "success"}})


async def done(client: Client, promise: dict[str, str]) -> None:
    status, answer = await client.settled(promise)
    assert status == 200, answer[:300]
    assert b'"error"' not in answer, answer[:300]


async def visits(server: Server, key: str, count: int) -> None:
    left = iter(range(count))

    async def one() -> None:
        client = Client(server, key)
        for _ in left:
            await visit(client)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


def grown(
    server: Server, home: Path, key: str, count: int, warm: int = WARM, swept: float = SWEPT_SECONDS
) -> tuple[Kept, Kept]:
    """What is kept after the first ``warm`` visits, and after ``count`` more; each time ``swept`` seconds later."""
    asyncio.run(visits(server, key, warm))
    time.sleep(swept)
    before = kept(server, home)
    asyncio.run(visits(server, key, count))
    time.sleep(swept)
    return before, kept(server, home)


def flat(before: Kept, after: Kept) -> bool:
    """Whether nothing grew that must not: descriptors, threads, workers, directories of weights."""
    return (
        after.descriptors <= before.descriptors + 5
        and after.threads <= before.threads + 5
        and after.trainer_mb < before.trainer_mb + WORKER_MB
        and after.sampler_mb < before.sampler_mb + WORKER_MB
        and after.directories <= before.directories + 5
    )


def main() -> None:
    cycles = int(os.environ.get("CYCLES", CYCLES))
    with tempfile.TemporaryDirectory(prefix="tuft-cycles-") as scratch:
        home = Path(scratch)
        (home / "notebooks").mkdir()
        with Server(home / "notebooks", home, env=environment(home)) as server:
            before, after = grown(server, home, key_of(home), cycles)
    print(f"| L7, {cycles} visits | before | after |\n| --- | --- | --- |")
    for each in fields(Kept):
        print(f"| {each.name} | {getattr(before, each.name):.0f} | {getattr(after, each.name):.0f} |")
    kilobytes = (after.rss_mb - before.rss_mb) * 1e3 / cycles
    print(f"\n{kilobytes:.1f} KB of the server's memory for each visit")
    sys.exit(not (flat(before, after) and kilobytes < KB_PER_CYCLE))


if __name__ == "__main__":
    main()
