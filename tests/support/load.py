"""Many clients beside a notebook: parked polls and large uploads at a real Jupyter server: ``make load``.

Meanwhile other processes ask the notebook's own ``/api/status``, and a kernel for an echo, and measure how long the
answers take; how late the server's event loop was, it says itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from examples.run_on_server import Server
from tests.support.live import environment, key_of
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire import tuft_wire_pb2 as pb

POLLS, UPLOADS, MEGABYTES = 1000, 50, 5
P99_MS, LAG_MS, GROWTH_MB = 100.0, 300.0, 60.0
"""``LAG_MS`` is the edge of the server's own histogram next to the 250 ms that are promised."""
ROOT = Path(__file__).parents[2]

WATCH = """
import http.client, json, sys, threading, time
host, port, path, token = sys.argv[1:]
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
connection = http.client.HTTPConnection(host, int(port), timeout=60)
found = []
while not over.is_set():
    began = time.perf_counter()
    connection.request("GET", path, headers={"Authorization": "token " + token})
    connection.getresponse().read()
    found.append((time.perf_counter() - began) * 1e3)
    over.wait(0.02)
print(json.dumps(found))
"""


ECHO = """
import json, sys, threading, time
from pathlib import Path
from examples.run_on_server import Kernel, Server
server = Server(Path("."), Path("."), token=sys.argv[2])
server.url = sys.argv[1]
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
found = []
with Kernel(server) as kernel:
    kernel.run("1")
    print("ready", flush=True)
    while not over.is_set():
        began = time.perf_counter()
        kernel.run("1")
        found.append((time.perf_counter() - began) * 1e3)
        over.wait(0.05)
print(json.dumps(found))
"""


@dataclass(slots=True)
class Measured:
    """``errors`` are statuses other than 200 and 408; ``latencies`` are those of ``/api/status`` and ``echoes`` those
    of a kernel, in milliseconds; ``lag_ms`` bounds how late the server's event loop was.
    """

    answered: int
    errors: int
    seconds: float
    grown_mb: float
    latencies: list[float]
    echoes: list[float]
    lag_ms: float

    @property
    def p99(self) -> float:
        return percentile(self.latencies, 0.99)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


class Client:
    """One tenant's plain HTTP, a connection for each request."""

    def __init__(self, server: Server, key: str) -> None:
        parts = urlsplit(server.url)
        self.host, self.port = parts.hostname or "", parts.port or 0
        self.root, self.key = f"{parts.path}tuft/api/v1", key
        self.seq = 0

    async def post(self, verb: str, body: Any, media: str = JSON) -> tuple[int, bytes]:
        return await self.send("POST", verb, body, media)

    async def send(self, method: str, verb: str, body: Any, media: str = JSON) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        lines = [
            f"{method} {self.root}/{verb} HTTP/1.1", "Host: x", "Connection: close", f"X-API-Key: {self.key}",
            f"Content-Type: {media}", f"Content-Length: {len(raw)}",
        ]  # fmt: skip
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
            await writer.drain()
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            return int(head.split(b" ", 2)[1]), answer
        finally:
            writer.close()

    async def told(self, verb: str, body: Any, media: str = JSON) -> Any:
        status, answer = await self.post(verb, body, media)
        assert status == 200, (verb, status, answer[:300])
        return json.loads(answer)

    async def settled(self, promise: Any) -> tuple[int, bytes]:
        """Poll as the SDK does: again at once after each 408."""
        while True:
            status, answer = await self.post("retrieve_future", {"request_id": promise["request_id"]})
            if status != 408:
                return status, answer

    async def new_run(self) -> str:
        session = (await self.told("create_session", {}))["session_id"]
        asked = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        await self.settled(await self.told("create_model", asked))
        return f"{session}:train:0"

    def passed(self, run: str, datums: int, tokens: int, loss: str = "cross_entropy") -> bytes:
        self.seq += 1
        return passed(run, self.seq, datums, tokens, loss)


def passed(run: str, seq: int, datums: int, tokens: int, loss: str = "cross_entropy") -> bytes:
    """The body of a pass."""
    body = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn=loss)
    for _ in range(datums):
        datum = body.data.add()
        datum.model_input.add().encoded_text.tokens = struct.pack(f"<{tokens}i", *[7] * tokens)
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = struct.pack(f"<{tokens}q", *[8] * tokens), pb.DTYPE_INT64
        target.shape[:] = [tokens]
    return body.SerializeToString()


@contextmanager
def watched(server: Server, found: list[float], echoes: list[float]) -> Any:
    """Other processes ask for ``/api/status``, and a kernel, meanwhile; their latencies go into the lists."""
    parts = urlsplit(server.url)
    status = [parts.hostname or "", str(parts.port), f"{parts.path}api/status", server.token]
    with _asking(ECHO, server.url, server.token) as kernel:
        assert kernel.stdout is not None
        assert kernel.stdout.readline() == b"ready\n"
        with _asking(WATCH, *status) as notebook:
            try:
                yield
            finally:
                for process, latencies in ((notebook, found), (kernel, echoes)):
                    out, _ = process.communicate(b"", timeout=120)
                    latencies += json.loads(out)


def _asking(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


async def lags(client: Client) -> dict[float, int]:
    """How often the server's loop was late by at most so many milliseconds, since its start."""
    _, text = await client.send("GET", "tuft/metrics", b"")
    edges = re.findall(r'^tuft_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', text.decode(), re.MULTILINE)
    return {float(edge) * 1e3: int(float(count)) for edge, count in edges}


def largest(before: dict[float, int], after: dict[float, int]) -> float:
    """The edge that no delay between the two passed."""
    new = {edge: after[edge] - before[edge] for edge in after}
    return min(edge for edge, count in new.items() if count == max(new.values()))


async def _measured(
    server: Server, client: Client, work: Callable[[], Awaitable[list[int]]], process: psutil.Process
) -> Measured:
    latencies: list[float] = []
    echoes: list[float] = []
    with watched(server, latencies, echoes):
        before, late = process.memory_info().rss, await lags(client)
        began = time.perf_counter()
        statuses = await work()
        seconds = time.perf_counter() - began
        grown, lag = (process.memory_info().rss - before) / 1e6, largest(late, await lags(client))
    good = sum(status == 200 for status in statuses)
    return Measured(good, len(statuses) - good, seconds, grown, latencies, echoes, lag)


async def parked_polls(server: Server, key: str, polls: int, datums: int) -> Measured:
    """``polls`` clients wait for a step that stands behind a pass of ``datums`` x 2,048 tokens."""
    client = Client(server, key)
    run = await client.new_run()

    async def work() -> list[int]:
        await client.told("forward_backward", client.passed(run, datums, 2048), PROTOBUF)
        client.seq += 1
        step = await client.told("optim_step", {"model_id": run, "seq_id": client.seq, "adam_params": {}})
        return [status for status, _ in await asyncio.gather(*(client.settled(step) for _ in range(polls)))]

    return await _measured(server, client, work, psutil.Process(server.pid))


async def uploads(server: Server, key: str, count: int, megabytes: int) -> Measured:
    """``count`` passes of that size, four at a time; each fails in the worker, once it has been read whole."""
    client = Client(server, key)
    run = await client.new_run()
    room = asyncio.Semaphore(4)

    async def one() -> int:
        async with room:
            body = client.passed(run, megabytes * 41, 2048, "ppo")
            promise = await client.told("forward_backward", body, PROTOBUF)
            status, answer = await client.settled(promise)
            assert b"advantages" in answer or b"logprobs" in answer, answer[:300]
            return status

    async def work() -> list[int]:
        return list(await asyncio.gather(*(one() for _ in range(count))))

    return await _measured(server, client, work, psutil.Process(server.pid))


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        root = Path(home) / "notebooks"
        root.mkdir()
        with Server(root, Path(home), env=environment(Path(home))) as server:
            key = key_of(Path(home))
            polls = asyncio.run(parked_polls(server, key, POLLS, 8))
            posts = asyncio.run(uploads(server, key, UPLOADS, MEGABYTES))
    print(
        "| row | answered | errors | seconds | /api/status p99 | slowest | kernel p99 | loop late by | server grew by |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, one in (
        (f"L1 {POLLS} parked polls", polls),
        (f"L2 {UPLOADS} uploads of {MEGABYTES} MB", posts),
    ):
        print(f"| {name} | {one.answered} | {one.errors} | {one.seconds:.1f} | {one.p99:.0f} ms "
              f"| {max(one.latencies):.0f} ms | {percentile(one.echoes, 0.99):.0f} ms | at most {one.lag_ms:.0f} ms "
              f"| {one.grown_mb:.0f} MB |")  # fmt: skip
    late = max(polls.lag_ms, posts.lag_ms) > LAG_MS
    short = (
        late
        or polls.errors
        or posts.errors
        or max(polls.p99, posts.p99) > P99_MS
        or polls.grown_mb > GROWTH_MB
    )
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
