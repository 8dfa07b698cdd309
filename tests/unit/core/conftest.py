"""A Redis of a test's own, and a lease that ends soon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer
from tuft_jupyter.core import journal_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.stop()


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_redis, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(journal_redis, "PATIENCE", 0.5)
