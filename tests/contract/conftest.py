"""A real Jupyter server for the contract tests: token authentication, XSRF on, below a path prefix, one for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.run_on_server import Kernel, Server

OURS = ("TUFT_ADDRESS", "TUFT_API_KEY", "TUFT_CONFIG", "TUFT_MODEL_PATH", "TINKER_BASE_URL", "TINKER_API_KEY")
ROOT = Path(__file__).parents[2]


def clean_environment(home: Path) -> dict[str, str]:
    """Variables of a server that knows nothing of the machine's user, its keys or its caches."""
    return {
        "TUFT_HOME": str(home / "tuft"),
        "HF_HOME": str(home / "huggingface"),
        "JUPYTER_CONFIG_DIR": str(home / "jupyter"),
        "IPYTHONDIR": str(home / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "TINKER_TELEMETRY": "0",
        "TUFT_STANDBY_WORKER": "false",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'server_ext'}",
    }


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of every engine that runs in the tests' own process: Ray remembers the first token it was given."""
    return tmp_path_factory.mktemp("ray-home")


@pytest.fixture(scope="session")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server at ``/user/alice/``."""
    home = tmp_path_factory.mktemp("alice")
    root = home / "notebooks"
    root.mkdir()
    for name in OURS:
        os.environ.pop(name, None)
    server = Server(root, home, base_url="/user/alice/", env=clean_environment(home))
    with server:
        yield server


@pytest.fixture(scope="module")
def kernel(alice: Server, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """A kernel of that server, fresh for each test module."""
    with Kernel(alice, f"{request.module.__name__.rpartition('.')[2]}.ipynb") as started:
        yield started
