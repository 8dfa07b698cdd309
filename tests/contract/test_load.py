"""Many clients beside a notebook, in small; in full with ``make load``."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from examples.run_on_server import Server
from tests.support.cycles import flat, grown
from tests.support.live import key_of
from tests.support.load import parked_polls, uploads

SLOW_MS = 1000.0
"""Far above what ``make load`` holds on a quiet machine: tests share theirs."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_hundreds_of_parked_polls_are_all_answered_and_the_notebook_goes_on(alice: Server) -> None:
    """L1, L2, P6."""
    measured = asyncio.run(parked_polls(alice, key_of(alice.work), polls=300, datums=4))
    assert (measured.answered, measured.errors) == (300, 0)
    assert measured.grown_mb < 60
    assert measured.p99 < SLOW_MS
    assert measured.echoes, "a kernel answers meanwhile"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_large_uploads_do_not_hold_the_notebook_up(alice: Server) -> None:
    """L2: bodies pass through the notebook's process undecoded."""
    measured = asyncio.run(uploads(alice, key_of(alice.work), count=6, megabytes=3))
    assert (measured.answered, measured.errors) == (6, 0)
    assert measured.p99 < SLOW_MS


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_clients_that_come_train_sample_and_go_leave_nothing_behind(alice: Server) -> None:
    """L7: no descriptor, no thread, no adapter in a worker. A thousand of them: ``make cycles``."""
    before, after = grown(alice, alice.work, key_of(alice.work), count=40, warm=15, swept=0.0)
    ephemeral = after.directories - before.directories
    assert flat(before, replace(after, directories=before.directories)), (before, after)
    assert ephemeral <= 40, "weights of a sampler stay until the next maintenance, and once only"
