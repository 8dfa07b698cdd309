"""Clients that hang up in the middle of a request that changes something: it is done whole, or not at all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil
import pytest

from tests.support.archives import adapter
from tests.support.http_server import ROOT, Server, on_server

MOMENTS = [n / 1000 for n in range(0, 60, 2)]
"""Seconds after a request was sent: some are while its files are written, some while it is put on record."""


async def hang_up(server: Server, method: str, path: str, body: bytes, after: float) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"{method} {ROOT}{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.host.key}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    await asyncio.sleep(after)
    writer.close()
    await writer.wait_closed()


async def settled(server: Server) -> tuple[set[str], set[str]]:
    """(directories of the checkpoints on record, directories on the disk), when nothing changes them any more."""
    checkpoints, seen = server.host.service.checkpoints, None
    while True:
        on_record = {each.directory for each in server.host.ledger.state.checkpoints.values()}
        now = on_record, {str(each) for each in checkpoints.root.iterdir()}
        if now == seen:
            return now
        seen = now
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("verb", ["upload", "copy"])
def test_a_checkpoint_that_is_on_record_has_its_files_although_nobody_waited_for_it(
    tmp_path: Path, verb: str
) -> None:
    """H7: nor is there a directory that no checkpoint is in."""
    upload = "/tuft/adapters?base_model=tuft/demo"

    async def body(server: Server) -> None:
        made = await server.ask("POST", upload, adapter())
        copied = {"source_path": json.loads(made.body)["tinker_path"], "destination_project_id": "p"}
        for moment in MOMENTS:
            if verb == "upload":
                await hang_up(server, "POST", upload, adapter(), moment)
            else:
                await hang_up(server, "POST", "/copy_weights", json.dumps(copied).encode(), moment)
        on_record, on_disk = await settled(server)
        assert len(on_record) > 1
        assert on_disk == on_record

    on_server(tmp_path, body)


@pytest.mark.parametrize("path", ["/tuft/adapters?base_model=tuft/demo", "/forward_backward"])
def test_a_body_that_breaks_off_leaves_nothing_open(tmp_path: Path, path: str) -> None:
    """L7: no descriptor with what came of it on the disk, and nobody who waits for the rest."""

    def held() -> tuple[int, int]:
        return psutil.Process().num_fds(), len(asyncio.all_tasks())

    async def body(server: Server) -> None:
        await server.ask("GET", "/sessions")
        before = held()
        head = f"POST {ROOT}{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.host.key}\r\n"
        for _ in range(10):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head.encode() + b"Content-Length: 200000\r\n\r\n" + bytes(100_000))
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(20):
            while held()[0] > before[0] or held()[1] > before[1]:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.05)

    on_server(tmp_path, body)
