"""A kernel alone in the world: its own home and cache, no servers but the test's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stub_server import StubServer
from tuft_jupyter.kernel import connect, discovery

OURS = ("TUFT_", "TINKER_", "HF_", "HUGGINGFACE_")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import os

    for name in list(os.environ):
        if name.startswith(OURS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TUFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(discovery, "daemons", lambda: iter(()))
    monkeypatch.setattr(discovery, "notebook_servers", lambda env: iter(()))
    monkeypatch.setattr(discovery, "DEFAULT_PORT", free_port())
    yield
    connect.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def other() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def dead() -> str:
    return f"http://127.0.0.1:{free_port()}"
