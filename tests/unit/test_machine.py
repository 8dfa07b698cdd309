"""Which GPUs of this machine are meant."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import ConfigError, load_settings
from tuft_jupyter.machine import interface_of, local_gpu
from tuft_jupyter_server import gpus
from tuft_jupyter_server.host import Host


@pytest.mark.parametrize(
    ("number", "uuid", "visible", "local"),
    [
        (5, "GPU-55", "4,5,6,7", 1),
        (3, "GPU-33", "4,5", None),
        (2, "GPU-22", None, 2),
        (2, "GPU-22", "", None),
        (1, "GPU-8f2a11", "GPU-77, GPU-8f2a", 1),
        (0, "MIG-abc/2/0", "MIG-abc/1/0,MIG-abc/2/0", 1),
        (5, "GPU-55", "4,-1,5", None),
    ],
)
def test_a_gpu_is_found_among_those_that_a_process_sees(
    number: int, uuid: str, visible: str | None, local: int | None
) -> None:
    """S3-26: physical 5 of 4,5,6,7 is the second one; UUIDs and MIG slices are found by name."""
    assert local_gpu(number, uuid, visible) == local


def test_the_interface_of_an_address_is_known() -> None:
    """S3-40."""
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("203.0.113.7") == ""


def test_gauges_show_the_gpus_that_the_server_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-26: on a shared machine the others' GPUs are nobody's business here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-55")
    assert [gpus._is_meant(n, f"GPU-{n}{n}") for n in (3, 4, 5)] == [False, True, True]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus._is_meant(3, b"GPU-33")


def test_a_setting_pins_the_gpus_of_the_server_and_of_what_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-26: a setting, a variable of ours or a trait; it goes before what the server was started with."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    env = {"TUFT_HOME": str(tmp_path), "TUFT_CUDA_VISIBLE_DEVICES": "6"}

    async def serve(given: dict[str, str]) -> None:
        host = Host(load_settings(None, env, given), ScriptedEngines())
        await host.start()
        await host.stop()

    asyncio.run(serve({}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    asyncio.run(serve({"cuda_visible_devices": "4,GPU-55,MIG-abc/2/0"}))
    seen = os.environ["CUDA_VISIBLE_DEVICES"]
    assert [local_gpu(n, uuid, seen) for n, uuid in ((4, "GPU-44"), (5, "GPU-55"), (7, "MIG-abc/2/0"))] == [
        0,
        1,
        2,
    ]
    assert [gpus._is_meant(n, f"GPU-{n}{n}") for n in (4, 5)] == [True, True]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("4,-1", "must name GPUs by number or UUID"),
        ("cuda:4", "must name GPUs by number or UUID"),
        ("4,,5", "must name GPUs by number or UUID"),
        ("4,5,4", "names 4 twice"),
    ],
)
def test_what_cuda_would_read_as_fewer_gpus_is_refused(given: str, problem: str, tmp_path: Path) -> None:
    """S3-26: CUDA ends the list silently at what it does not know."""
    with pytest.raises(ConfigError, match=problem):
        load_settings(None, {"TUFT_HOME": str(tmp_path), "TUFT_CUDA_VISIBLE_DEVICES": given})
