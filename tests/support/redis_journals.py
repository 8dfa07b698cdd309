"""Journals in one Redis, what is written to them and what is read from them again."""

from __future__ import annotations

from pathlib import Path

from tests.support.redis_server import RedisServer
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.types import Record


def line(i: int, blob: bytes | None = None, kind: str = "op_accepted") -> Record:
    return Record(kind, "alice", {"i": i, "request_id": f"r{i}"}, blob=blob)


def journal(redis: RedisServer, tmp_path: Path, namespace: str = "tuft", **more: int) -> RedisJournal:
    return RedisJournal(redis.url, namespace, tmp_path / "markers", **more)


async def numbers(opened: RedisJournal) -> list[int]:
    told: list[int] = []
    await opened.open(lambda record: told.append(record.n))
    await opened.close()
    return told
