"""The stock SDK 0.38 against a real Jupyter server on a path prefix, with token authentication, from a real kernel."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import psutil
import pytest

from examples.run_on_server import Kernel, Server
from tests.support import sdk_verbs
from tests.support.live import key_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def client(kernel: Kernel) -> Kernel:
    """The kernel with a connected client; the first pass waits until the model is loaded."""
    kernel.run(
        "%load_ext tuft_jupyter\n%tuft init\n"
        "from tests.support import sdk_verbs\n"
        "client = sdk_verbs.Client()\nclient.loss()",
        timeout=180,
    )
    return kernel


@pytest.mark.parametrize("verb", [verb.__name__ for verb in sdk_verbs.VERBS])
def test_the_stock_sdk_can(client: Kernel, verb: str) -> None:
    """S0-01, S1-17, S1-35, S1-36, S1-38, S1-39, S1-41, S1-43: each verb of the protocol, with its numbers."""
    client.run(f"sdk_verbs.{verb}(client)", timeout=120)


@pytest.mark.parametrize("name", sdk_verbs.REFUSED)
def test_refused_by_name_without_disturbing_anything(client: Kernel, name: str) -> None:
    """S1-19, S1-30, S1-34."""
    client.run(f"sdk_verbs.refuse(client, {name!r})", timeout=60)


def test_after_all_that_the_notebook_servers_process_has_loaded_no_model_library(
    client: Kernel, alice: Server
) -> None:
    """S1-65: training and sampling happen elsewhere; torch and vLLM are not even mapped into this process."""
    asked = {"model": "tuft/demo", "prompt": "Hello", "max_tokens": 2}
    headers = {"X-API-Key": key_of(alice.work)}
    httpx.post(f"{alice.url}tuft/oai/api/v1/completions", json=asked, headers=headers).raise_for_status()
    mapped = {Path(each.path).name for each in psutil.Process(alice.pid).memory_maps()}
    assert any(name.startswith("libpython") or "python" in name for name in mapped)
    assert not {name for name in mapped if name.startswith(("libtorch", "libc10", "vllm", "_C.abi3"))}


def test_a_page_of_another_site_can_do_nothing(alice: Server) -> None:
    """T5: the API ignores cookies, and the lab's routes are Jupyter's."""
    state = alice.request("GET", "tuft/lab/state")
    assert state["status"]["tenant"]
    assert "tml-" not in json.dumps(state)
