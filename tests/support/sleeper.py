"""A process that writes to a journal in Redis without end, to be stopped in the middle of it."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

from tuft_jupyter.core import journal_redis
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.types import Record

LEASE_SECONDS = 0.3


def write(url: str, namespace: str, markers: Path, tell: Connection) -> None:
    """Tell ``open`` when it writes; every refusal; and its end, when the journal is another's."""
    journal_redis.LEASE_SECONDS = LEASE_SECONDS
    asyncio.run(_write(journal_redis.RedisJournal(url, namespace, markers), tell))
    tell.close()


async def _write(kept: journal_redis.RedisJournal, tell: Connection) -> None:
    await kept.open(lambda record: None)
    tell.send("open")
    i = 0
    while not kept.problem:
        i += 1
        try:
            await kept.append(Record("k", "t", {"from": "sleeper", "i": i}))
        except Overloaded as refused:
            tell.send(f"refused {refused}")
