"""A future of a training client, which the SDK (0.38) lets pass for the client: it may lie about in a kernel."""

from __future__ import annotations

import gc
import sys
import warnings
from concurrent.futures import Future
from typing import Any

import pytest
from tinker import TrainingClient
from tinker.lib.public_interfaces.api_future import AwaitableConcurrentFuture
from tinker.lib.public_interfaces.backcompat_training_client_future import BackcompatTrainingClientFuture

import tuft_jupyter
from tests.support.stub_server import KEY, StubServer
from tests.unit.kernel.test_commands import ONE, TWO, run_of
from tuft_jupyter.kernel.stopping import Stopping


@pytest.fixture
def told(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    shown = {"version": "v", "runs": [run_of(ONE), run_of(TWO)], "checkpoints": []}
    server.routes["GET /tuft/outlook"] = lambda query: (200, shown)
    return server


def made(run: str) -> tuple[Any, Any]:
    """A training client of the SDK, and the future that it came in."""
    info: Any = None
    holder: Any = None
    client, future = TrainingClient(holder, 0, run, info=info), Future[TrainingClient]()
    future.set_result(client)
    return client, BackcompatTrainingClientFuture(AwaitableConcurrentFuture(future))


def test_a_training_cell_counts_the_client_and_not_its_future() -> None:
    """`future = service.create_lora_training_client(...)`, `training = future.result()`: both names stay."""
    client, future = made(ONE)
    with Stopping(lambda: [run_of(ONE)], print) as stopping:
        client._request_id_counter += 1
        assert stopping.used() == [client]
    assert future.result() is client


def test_a_widget_takes_the_future_as_it_takes_the_client(told: StubServer) -> None:
    _, future = made(TWO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the SDK's, on reading an attribute of the future
        assert tuft_jupyter.LossCurve(future).runs == [TWO]
        assert tuft_jupyter.CheckpointTable(future).run == TWO
        assert tuft_jupyter.Playground(future).models == [TWO]
        assert tuft_jupyter.Playground((future, "tuft/demo")).models == [TWO, "tuft/demo"]


def test_a_widget_that_was_called_wrongly_leaves_its_error_alone(
    told: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(TypeError, match="positional"):
        tuft_jupyter.Playground("tuft/demo", ONE)
    gc.collect()
    assert not ignored
