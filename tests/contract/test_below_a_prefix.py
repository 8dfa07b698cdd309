"""The service of a Hub is asked below the path that the Hub gave it, whatever characters that has."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from tests.support.live import ask, environment, key_of, until

SERVING = """
import asyncio, os
from tuft_jupyter.config import load_settings
from tuft_jupyter_server.daemon import serve_host
from tuft_jupyter_server.host import Host
asyncio.run(serve_host(Host(load_settings(None, os.environ)), "/services/c++"))
"""


def test_a_service_is_found_at_its_own_path_and_nowhere_else(tmp_path: Path) -> None:
    env = environment(tmp_path, TUFT_PORT="0")
    served = subprocess.Popen([sys.executable, "-c", SERVING], env=env, start_new_session=True)
    try:
        told = tmp_path / "tuft" / "tuft_current_server"
        until(lambda: told.exists() or served.poll() is not None, 60, "the service did not start")
        address, key = told.read_text().strip(), key_of(tmp_path)
        assert ask(f"{address}/services/c++", "get_server_capabilities", key)["supported_models"]
        for elsewhere in ("", "/tuft", "/services/cc"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(address + elsewhere, "get_server_capabilities", key)
    finally:
        served.terminate()
        assert served.wait(30) == 0
