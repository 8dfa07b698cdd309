"""What is bound to fail at its first use is told when the server starts, and the start does not wait for it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.logs import messages
from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter.engine import ray_place
from tuft_jupyter_server.host import Host

TWO_MODELS = [
    {"model_name": "kept", "model_path": "tuft/demo"},
    {"model_name": "gone", "model_path": "tuft/demo"},
]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    caplog.set_level(logging.WARNING, "tuft_jupyter")


def host(home: Path, given: Mapping[str, Any]) -> Host:
    kept = {"mode": "file_redis", "file_path": str(home / "journal.sqlite")}
    return Host(
        load_settings(None, {"TUFT_HOME": str(home)}, {"persistence": kept, **given}), ScriptedEngines()
    )


async def started(served: Host) -> None:
    """Start, and let what is told at the start be told."""
    await served.start()
    assert served.serving
    (told,) = [task for task in served._tasks if task.get_name() == "foreseen"]
    await told


async def start_and_stop(served: Host) -> None:
    await started(served)
    await served.stop()


def test_a_run_whose_model_left_the_configuration_is_told_with_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        first = host(tmp_path, {"supported_models": TWO_MODELS})
        await started(first)
        service, owner = first.service, first.owner
        session = await service.sessions.open(owner, {})
        for number, model in enumerate(("kept", "gone")):
            made = await service.runs.create_model(owner, session, number, model, {"rank": 8}, {}, b"c")
            assert await service.retrieve(owner, made, 5.0)
        await first.stop()
        assert not messages(caplog)
        await start_and_stop(host(tmp_path, {"supported_models": TWO_MODELS[:1]}))

    asyncio.run(body())
    (told,) = messages(caplog)
    assert told.startswith("1 of the runs on record")
    assert "'gone'" in told
    assert "supported_models" in told


@pytest.mark.parametrize("cluster", [False, True])
def test_a_sampler_that_is_not_installed_is_told_but_for_a_cluster(
    cluster: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of a cluster have packages of their own, however the cluster is named."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "tuft_jupyter_server.foreseen.importlib.util.find_spec",
        lambda name: None if name == "vllm" else found(name),
    )
    models = [{**TWO_MODELS[0], "sampler_type": "vllm"}, TWO_MODELS[1]]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if cluster:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        asyncio.run(start_and_stop(host(tmp_path, {"supported_models": models})))
    told = messages(caplog)
    assert len(told) == (0 if cluster else 1)
    assert all(text.startswith("kept cannot be sampled") for text in told)
    assert all('pip install "tuft-jupyter[vllm]"' in text for text in told)


def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S3-24: in the background; requests are served before anybody has tried to reach it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        asyncio.run(start_and_stop(host(tmp_path, {"ray_address": address})))
    (told,) = messages(caplog)
    assert "no worker can be started yet" in told
    assert address in told


def test_commands_that_start_a_cluster_can_be_copied_from_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_place, "_current_clusters", lambda: iter([tmp_path / "none runs here"]))
    monkeypatch.setattr(ray_place, "CURRENT_CLUSTER", tmp_path / "none runs here")
    asyncio.run(start_and_stop(host(tmp_path, {"ray_address": "require"})))
    (told,) = messages(caplog)
    assert "ray start --head --port 6379 --node-ip-address" in told
    assert "\n" not in told


def test_a_port_that_was_chosen_for_weights_and_is_taken_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S4-15: with the variable's name, the reason and the way out; a free one is not spoken of."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        asyncio.run(start_and_stop(host(tmp_path, {"backends": {"vllm_group_port": port}})))
    (told,) = [each for each in messages(caplog) if "vllm_group_port" in each]
    assert f"VLLM_GROUP_PORT) {port} cannot be had on this machine: Address already in use" in told
    caplog.clear()
    asyncio.run(start_and_stop(host(tmp_path, {"backends": {"vllm_group_port": port}})))
    assert not [each for each in messages(caplog) if "vllm_group_port" in each]
