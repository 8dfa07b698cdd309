"""``%tuft ray``, and what ``status`` and ``doctor`` tell of nodes and GPUs."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest

from tests.support.stub_server import KEY, StubServer
from tuft_jupyter.kernel import connect, doctor
from tuft_jupyter.kernel.commands.cluster import RAY, ray_grid
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.report import status_table

MESH = {"data_parallel": 2, "training_nodes": 1, "sampling_replicas": 0, "tensor_parallel": 1}
PLACED = {
    "model": "m",
    "mode": "debug_train_only",
    "gpus": 2,
    "mesh": MESH,
    "processes": [
        {"role": "training", "rank": 0, "node": "abcdef0123", "gpus": ["0"], "head": True},
        {"role": "training", "rank": 1, "node": "abcdef0123", "gpus": ["3"], "head": True},
    ],
}
FOUND: dict[str, Any] = {
    "address": "10.0.0.1:6379",
    "why": "ray_address is set",
    "nodes": [
        {"id": "abcdef0123", "ip": "10.0.0.1", "gpus": 4, "free_gpus": 2},
        {"id": "99", "ip": "10.0.0.2", "gpus": 0, "free_gpus": 0},
    ],
    "placements": [PLACED],
    "commands": {"head": "ray start --head ...", "worker": "ray start --address ..."},
}


def asked(what: str) -> Any:
    return RAY.run(argparse.Namespace(what=what))


def test_nodes_are_listed_with_their_gpus_and_what_is_placed_there(
    server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-02: and the commands that start a cluster are printed, to be copied."""
    with pytest.raises(TuftConnectionError, match="%tuft init"):
        asked("status")
    server.routes["GET /tuft/ray"] = lambda _: (200, FOUND)
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    connect.init()
    try:
        shown = repr(asked("status"))
        assert "10.0.0.1:6379, 2 nodes, 4 GPUs" in shown
        assert "m training 0 (GPU 0); m training 1 (GPU 3)" in shown
        assert asked("head-command") == "ray start --head ..."
        assert asked("worker-command") == "ray start --address ..."
    finally:
        connect.shutdown()


def test_who_may_not_look_at_the_cluster_is_not_told_that_the_key_is_wrong(
    server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user of a Hub's shared service has no other key to set, and the one there is is good."""
    refusal = "only the owner of this server and its admins may look at its cluster: ask one of them"
    server.routes["GET /tuft/ray"] = lambda _: (403, {"detail": refusal})
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    connect.init()
    try:
        with pytest.raises(TuftConnectionError, match=f"refuses: {refusal}.$"):
            asked("status")
    finally:
        connect.shutdown()


def test_a_ray_that_does_not_run_yet_is_no_error() -> None:
    assert "starts with the first model" in repr(ray_grid({**FOUND, "address": None}))


def test_status_shows_the_mesh_of_a_placed_model() -> None:
    """S2-65."""
    shown = repr(status_table("http://here", "a test", {"placements": [PLACED]}, owned=False))
    assert "m: 2 GPUs, debug_train_only (data parallel 2, training nodes 1, tensor parallel 1)" in shown


def test_doctor_names_the_interface_of_this_machines_address() -> None:
    """S3-40."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+ on [\w.@-]+", doctor.network())
