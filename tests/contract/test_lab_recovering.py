"""The lab at a server whose journal cannot be read yet: another one still holds it."""

from __future__ import annotations

import contextlib
import fcntl
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from examples.run_on_server import Server
from tests.support.live import environment, until


@pytest.fixture
def held(tmp_path: Path) -> Iterator[IO[str]]:
    """The lock of the journal, held by this process."""
    (tmp_path / "tuft").mkdir()
    with (tmp_path / "tuft" / "journal.sqlite.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def test_what_the_lab_asks_for_waits_for_the_journal(tmp_path: Path, held: IO[str]) -> None:
    """F8, P4: nothing is written into a state that was not read, and the panel is told why; then it goes on."""
    keys = ("POST", "tuft/lab/api/v1/tuft/keys", {"tenant": "dave", "name": "early"})
    (tmp_path / "notebooks").mkdir()
    with Server(tmp_path / "notebooks", tmp_path, env=environment(tmp_path)) as server:
        with pytest.raises(urllib.error.HTTPError) as early:
            server.request(*keys)
        assert early.value.code == 429
        assert "in use by" in early.value.read().decode()
        fcntl.flock(held, fcntl.LOCK_UN)

        def made() -> bool:
            with contextlib.suppress(urllib.error.HTTPError):
                return bool(server.request(*keys)["key"].startswith("tml-"))
            return False

        until(made, 30, "no key is made")
        assert [key["name"] for key in server.request("GET", keys[1])["keys"]].count("early") == 1
