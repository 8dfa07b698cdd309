"""A daemon that nobody wants any more before it has read its journal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live import environment
from tuft_jupyter import home as homes

READING = """
import asyncio, os
from tuft_jupyter.config import load_settings
from tuft_jupyter_server.daemon import serve_host
from tuft_jupyter_server.host import Host

class WithALongJournal(Host):
    async def start(self):
        print("reading", flush=True)
        await asyncio.Event().wait()

asyncio.run(serve_host(WithALongJournal(load_settings(None, os.environ))))
"""


@pytest.mark.parametrize("why", ["told to stop", "its owner is gone"])
def test_a_daemon_that_still_reads_its_journal_ends_at_once_and_cleanly(why: str, tmp_path: Path) -> None:
    """S0-42: as any other does; healthz is answered by then, so whoever waits for that may tell it to stop."""
    servers_end, owners_end = os.pipe()
    env = environment(tmp_path, TUFT_PORT="0", TUFT_OWNER_FD=str(servers_end))
    with (
        os.fdopen(owners_end, "wb", buffering=0) as owner,
        subprocess.Popen(
            [sys.executable, "-c", READING], env=env, stdout=subprocess.PIPE, pass_fds=(servers_end,)
        ) as served,
    ):
        try:
            os.close(servers_end)
            assert served.stdout is not None
            assert served.stdout.readline() == b"reading\n"
            if why == "told to stop":
                served.terminate()
            else:
                owner.close()
            assert served.wait(30) == 0
        finally:
            served.kill()
    assert homes.read_address(tmp_path / "tuft") is None
