"""A panel that stopped reading its websocket (a laptop that sleeps, a tab in the background), beside one that reads."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import websocket

from examples.run_on_server import Server
from tests.contract.conftest import clean_environment
from tests.support.live import key_of
from tests.support.load import Client

RECORDS, SIZE, AT_ONCE = 1800, 8192, 4
"""Enough to fill the kernel's buffers, then the queue of a panel."""
SLOW_SECONDS = 2.0
"""Far above the 0.2 s of a quiet machine: tests share theirs."""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own: what it leaves on record is much."""
    (tmp_path / "notebooks").mkdir()
    with Server(tmp_path / "notebooks", tmp_path, env=clean_environment(tmp_path)) as server:
        yield server


def panel(server: Server) -> websocket.WebSocket:
    return websocket.create_connection(
        f"{server.url.replace('http', 'ws', 1)}tuft/lab/feed",
        header=[f"Authorization: token {server.token}"],
        timeout=60,
        sockopt=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)],
        http_no_proxy=["127.0.0.1"],
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_panel_that_never_reads_slows_nobody_and_is_told_to_start_anew(mine: Server) -> None:
    """L5: its queue is bounded, the other panel hears every record at once, the server's memory stays."""
    stuck, reading = panel(mine), panel(mine)
    late: list[float] = []
    again: list[str] = []

    def read() -> None:
        while len(late) < RECORDS:
            message = json.loads(reading.recv())
            again.extend(["resync"] * (message["type"] == "resync"))
            late.extend(
                time.time() - float(record["data"]["user_metadata"]["sent"])
                for record in message.get("records", ())
                if record["kind"] == "session_opened"
            )

    listening = threading.Thread(target=read)
    listening.start()
    server = psutil.Process(mine.pid)
    before = server.memory_info().rss

    async def write() -> None:
        client = Client(mine, key_of(mine.work))
        left = iter(range(RECORDS))

        async def one() -> None:
            for _ in left:
                await client.told(
                    "create_session", {"user_metadata": {"sent": str(time.time()), "note": "x" * SIZE}}
                )

        await asyncio.gather(*(one() for _ in range(AT_ONCE)))

    asyncio.run(write())
    listening.join(60)
    grown = (server.memory_info().rss - before) / 1e6
    assert (len(late), again) == (RECORDS, [])
    assert sorted(late)[int(0.99 * RECORDS)] < SLOW_SECONDS
    assert grown < 60, "one stuck panel holds a queue of megabytes, not all that it was sent"
    heard = [json.loads(stuck.recv())]
    while heard[-1]["type"] != "resync":
        heard.append(json.loads(stuck.recv()))
    told = sum(len(message.get("records", ())) for message in heard)
    assert told < RECORDS
    for each in (stuck, reading):
        each.close()
    print(
        f"p99 {sorted(late)[int(0.99 * RECORDS)] * 1e3:.0f} ms, {grown:.0f} MB, {told} records before the resync"
    )
