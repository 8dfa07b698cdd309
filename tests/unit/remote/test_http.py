"""Servers elsewhere as HTTP sees them: which of them are trusted, and what of the requests is logged."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stub_server import StubServer
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.tinker_client import KIND

DOWNLOAD = """
import asyncio, contextlib, sys
from pathlib import Path
from tuft_jupyter.engine.remote.http import Server, Unreachable
from tuft_jupyter.engine.remote.tinker_client import KIND
from tuft_jupyter_server import logs

async def main():
    server = Server(KIND, sys.argv[1])
    assert await server.probe()
    with contextlib.suppress(Unreachable):
        await server.download(sys.argv[1] + "/tuft/files/signed-permission", Path(sys.argv[2]))
    await server.close()

logs.configure("debug", "lines")
asyncio.run(main())
"""


def probed(address: str) -> bool:
    async def probe() -> bool:
        server = Server(KIND, address)
        try:
            return await server.probe()
        finally:
            await server.close()

    return asyncio.run(probe())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_server_elsewhere_is_trusted_as_kernels_trust_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StubServer() as there:
        certificate = there.speak_tls(tmp_path)
        assert not probed(there.address)
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert probed(there.address)


def test_no_request_to_a_server_elsewhere_is_logged(tmp_path: Path) -> None:
    """T10: an address to download from is a permission; and a server is looked at every five seconds."""
    with StubServer() as there:
        script = [sys.executable, "-c", DOWNLOAD, there.address, str(tmp_path / "file")]
        done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "reachable" in done.stderr
    assert "GET /tuft/files/signed-permission" in [route for route, _ in there.asked]
    assert "signed-permission" not in done.stderr
    assert "healthz" not in done.stderr
