"""Clients that are slow, half gone, or many: nobody else notices, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest

from tests.support.http_server import ROOT, Server, on_server
from tests.support.loops import at_best
from tuft_jupyter_server import base_handler, tinker


def head(server: Server, path: str, length: int) -> bytes:
    lines = f"POST {ROOT}{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.host.key}\r\n"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def descriptors() -> int:
    return psutil.Process().num_fds()


async def until_descriptors(most: int) -> None:
    async with asyncio.timeout(10):
        while descriptors() > most:  # noqa: ASYNC110 - the kernel says when they are gone
            await asyncio.sleep(0.01)


async def cut_off(reader: asyncio.StreamReader) -> bytes:
    """What came before the end. A socket closed with a byte unread in it is reset, not ended: no less closed."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def test_who_sends_a_byte_now_and_then_is_cut_off_and_disturbs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L3: two hundred bodies that never end are closed at the deadline; others are served all the while."""
    monkeypatch.setattr(tinker, "BODY_SECONDS", 1.0)

    async def body(server: Server) -> None:
        await server.new_run()

        async def disturbed() -> float:
            """Seconds of the slowest request of others."""
            slow = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(200)]
            for _, writer in slow:
                writer.write(head(server, "/create_session", 1000) + b"{")
            began = time.monotonic()
            slowest = 0.0
            ended = asyncio.gather(*(cut_off(reader) for reader, _ in slow))
            while not ended.done():
                asked = time.monotonic()
                await server.post("/create_session", {})
                slowest = max(slowest, time.monotonic() - asked)
                for _, writer in slow:
                    writer.write(b" ")
                await asyncio.sleep(0.05)
            assert set(ended.result()) == {b""}, "closed, and nothing answered"
            assert 0.9 < time.monotonic() - began < 10.0
            for _, writer in slow:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            return slowest

        before = descriptors()
        assert await at_best(disturbed, 1.0) < 1.0
        await until_descriptors(before + 10)

    on_server(tmp_path, body)


def test_connections_that_break_at_any_point_leave_no_descriptor(tmp_path: Path) -> None:
    """L3: a thousand that end in the head, in the body, or before the answer."""

    async def body(server: Server) -> None:
        await server.post("/create_session", {})
        before = descriptors()
        for i in range(1000):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            whole = head(server, "/create_session", 2) + b"{}"
            writer.write(whole[: len(whole) * (i % 10 + 1) // 10])
            await writer.drain()
            writer.transport.abort()
        await until_descriptors(before + 5)
        await server.post("/create_session", {})

    on_server(tmp_path, body)


def test_who_does_not_read_a_stream_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L3: a reader that stops is gone after its minute (here less), and what it was sent is not made up whole."""
    monkeypatch.setattr(base_handler, "TAKES_SECONDS", 0.5)

    async def body(server: Server) -> None:
        run = await server.new_run()
        save = {"model_id": run, "seq_id": 2, "path": "n"}
        promise = await server.post("/save_weights_for_sampler", save)
        await server.post("/retrieve_future", {"request_id": promise["request_id"]})
        (checkpoint,) = server.host.ledger.state.checkpoints.values()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            file = Path(checkpoint.directory) / name
            with file.open("wb") as made:
                made.truncate(2**26)
        address = await server.ask("GET", f"/training_runs/{run}/checkpoints/sampler_weights/n/archive")
        path = "/" + json.loads(address.body)["url"].split("/", 3)[3]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**12)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readexactly(100)
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while server.http._connections:  # noqa: ASYNC110 - a plain set
                await asyncio.sleep(0.01)
        writer.close()

    on_server(tmp_path, body)
