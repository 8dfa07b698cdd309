"""What the protocol itself costs: an engine that answers at once, the unmodified SDK, small requests by the thousand.

The instant engine is the tests' own: bodies are journaled, decoded, checked and encoded as in the product, nothing is
computed. Small requests go to a real notebook server, and to TuFT's server beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import (
    MODEL,
    Row,
    SdkLoop,
    at_most,
    environment,
    in_a_process,
    quantile,
    sdk,
    server,
    show,
    tokens_of,
)

ROWS, LENGTH = 8, 512
STEPS, WARM = 60, 10
STEP_MS = 12.0
BOTH_ENDS = (
    "8.5 ms where a plain step of 16 tokens takes 20 ms, 16 and 17 where it took 23 and 30. Half of the processor "
    "time is the SDK's own. Tried: steps that follow their pass, commits in groups, "
    "tensors that are not decoded in the server (kept)"
)
SAMPLES = 1000
CONNECTIONS, SECONDS = 16, 3.0
PEER = "0.2.2"
PEER_SDK = "0.25.0"
PEER_NEEDS = (
    "fastapi>=0.133,<0.137", "uvicorn[standard]>=0.38", "opentelemetry-api", "opentelemetry-exporter-otlp",
    "opentelemetry-instrumentation-fastapi", "opentelemetry-instrumentation-logging", "opentelemetry-sdk",
    "omegaconf>=2.3", "nvidia-ml-py>=13", "typer>=0.20.1",
)  # fmt: skip
PEER_KEY = "tml-peer"


def measure() -> list[Row]:
    with instant_server() as (address, key):
        steps, failed, seconds = in_a_process(sdk_times, address, key)
    with server() as started:
        credential = (started.work / "tuft" / "credentials").read_text().strip()
        ours = small_gets(f"{started.url}tuft/api/v1/get_server_capabilities", credential)
    rows = [
        at_most(f"instant engine: forward_backward + optim_step of {ROWS} x {LENGTH}, median",
                quantile(steps, 0.5) * 1e3, STEP_MS, " ms", note=BOTH_ENDS),
        Row("the same, p95", f"{quantile(steps, 0.95) * 1e3:.1f} ms"),
        at_most(f"{SAMPLES} concurrent sample(): errors", failed, 0),
        Row(f"{SAMPLES} concurrent sample(): all answered in", f"{seconds:.1f} s"),
        Row(f"small GET at {CONNECTIONS} connections", f"{ours:.0f}/s"),
    ]  # fmt: skip
    try:
        with peer_server() as address:
            theirs = small_gets(f"{address}/api/v1/get_server_capabilities", PEER_KEY)
        rows.append(Row(f"the same of TuFT {PEER} (FastAPI)", f"{theirs:.0f}/s"))
    except OSError as error:  # no registry to take it from
        rows.append(Row(f"the same of TuFT {PEER} (FastAPI)", f"not measured: {error}"))
    return rows


# ---- the server with the instant engine


@contextlib.contextmanager
def instant_server() -> Iterator[tuple[str, str]]:
    """Address and key of a server, in a process of its own, whose engine answers at once."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as home:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, home))
        process.start()
        try:
            yield ours.recv()
        finally:
            ours.send("stop")
            process.join(30)
            process.kill()


def serve(parent: Connection, home: str) -> None:
    from tornado.httpserver import HTTPServer
    from tornado.testing import bind_unused_port
    from tornado.web import Application

    from tests.support.fake_engine import FakeEngines
    from tuft_jupyter.config import load_settings
    from tuft_jupyter_server.host import Host
    from tuft_jupyter_server.tinker import handlers

    async def run() -> None:
        settings = load_settings(None, {"TUFT_HOME": home})
        engines: Any = FakeEngines()
        engines.workers = list
        engines.trainer.part_tokens = (
            ROWS * LENGTH
        )  # what answers at once need not be given its work in parts
        host = Host(settings, engines=engines)
        await host.start()
        limit = settings.max_body_bytes
        http = HTTPServer(
            Application(handlers("/tuft/api/v1", host.api, host.keys, limit)), max_body_size=limit
        )
        socket, port = bind_unused_port()
        http.add_socket(socket)
        parent.send((f"http://127.0.0.1:{port}/tuft", host.key))
        await asyncio.to_thread(parent.recv)
        http.stop()
        await host.stop()

    asyncio.run(run())


# ---- clients, each in a process of its own


def sdk_times(address: str, key: str) -> tuple[list[float], int, float]:
    """Seconds of each step; how many samples failed; seconds until all of them were answered."""
    os.environ.update(TINKER_TELEMETRY="0", NO_PROXY="127.0.0.1")
    from tinker import types

    with sdk(address, key) as client:
        rows = [[token % 1000 for token in row] for row in tokens_of(ROWS, LENGTH)]
        loop = SdkLoop(client, rows)
        times = []
        for _ in range(WARM + STEPS):
            began = time.perf_counter()
            loop.step()
            times.append(time.perf_counter() - began)
        sampling = client.create_sampling_client(base_model=MODEL).result()
        params = types.SamplingParams(max_tokens=8, seed=1)
        prompt = types.ModelInput.from_ints(list(range(32)))
        sampling.sample(prompt, 1, params).result()
        began = time.perf_counter()
        waiting = [sampling.sample(prompt, 1, params) for _ in range(SAMPLES)]
        failed = 0
        for future in waiting:
            try:
                failed += len(future.result(timeout=120).sequences[0].tokens) != params.max_tokens
            except Exception:  # noqa: BLE001 - whatever it is, it is counted
                failed += 1
        return times[WARM:], failed, time.perf_counter() - began


def small_gets(url: str, key: str) -> float:
    """Requests a second over connections that are kept open."""
    return in_a_process(count_gets, url, key)


def count_gets(url: str, key: str) -> float:
    parts = urlsplit(url)
    asked = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nX-API-Key: {key}\r\n\r\n".encode()

    async def one(until: float) -> int:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        answered = 0
        while time.perf_counter() < until:
            writer.write(asked)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError(head.decode())
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            answered += 1
        writer.close()
        return answered

    async def all_of_them() -> float:
        await asyncio.gather(*(one(time.perf_counter() + 0.5) for _ in range(CONNECTIONS)))  # warm
        began = time.perf_counter()
        done = await asyncio.gather(*(one(began + SECONDS) for _ in range(CONNECTIONS)))
        return sum(done) / (time.perf_counter() - began)

    return asyncio.run(all_of_them())


# ---- the peer


@contextlib.contextmanager
def peer_server() -> Iterator[str]:
    """TuFT's own server with its toy backend. Its web packages are its own, torch and Ray are taken from here."""
    import socket

    place = peer()
    from tests.support.sdk_matrix import sdk

    with tempfile.TemporaryDirectory(prefix="tuft-peer-") as name, socket.socket() as free:
        home = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        configuration = home / "tuft_config.yaml"
        configuration.write_text(
            f"checkpoint_dir: {home / 'checkpoints'}\nauthorized_users:\n  {PEER_KEY}: bench\n"
            f"supported_models:\n  - model_name: tiny\n    model_path: {home}\n    max_model_len: 2048\n"
        )
        path = os.pathsep.join(map(str, (place / "tuft", sdk(PEER_SDK), place / "web")))
        env = {**os.environ, **environment(home, TUFT_CPU_TEST="1", PYTHONPATH=path)}
        command = [
            sys.executable,
            "-m",
            "tuft",
            "launch",
            "--port",
            str(port),
            "--config",
            str(configuration),
        ]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            answers(address, process)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def peer() -> Path:
    """The directory that holds TuFT and its web packages; made if it is not there. OSError without a registry."""
    from tests.support.sdk_matrix import pip

    place = Path(sys.prefix) / ".peer" / PEER
    if not place.exists():
        fresh = place.with_name(f"{PEER}.{os.getpid()}")
        try:
            pip("install", "--quiet", "--no-deps", "--target", str(fresh / "tuft"), f"tuft=={PEER}")
            pip("install", "--quiet", "--target", str(fresh / "web"), *PEER_NEEDS)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from None
        fresh.rename(place)
    return place


def answers(address: str, process: subprocess.Popen[bytes]) -> None:
    import urllib.request

    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/v1/healthz", timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError("it did not start") from None
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(not show(measure()))
