"""Adapters that arrive: over real HTTP with scripted engines, through the lab's route, and with the real engine."""

from __future__ import annotations

import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from examples.run_on_server import Kernel, Server
from tests.support import http_server, peft_trip
from tests.support.archives import adapter, packed
from tests.support.http_server import BOB_KEY, on_server, refusal
from tests.support.live import key_of, until
from tuft_jupyter.core.views import state_view
from tuft_jupyter_server import tinker

WHERE = "/tuft/adapters?base_model=tuft/demo"


def test_an_uploaded_adapter_is_the_callers_checkpoint_also_after_a_restart(tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    async def body(server: http_server.Server) -> None:
        answer = await server.ask("POST", WHERE + "&name=mine&ttl_seconds=7200", adapter())
        assert answer.code == 200, answer.body
        told.update(json.loads(answer.body))
        assert told["tinker_path"].endswith(":train:0/weights/mine")
        assert told["lora_rank"] == 4
        await seen(server)
        stranger = await server.ask("POST", "/weights_info", {"tinker_path": told["tinker_path"]}, BOB_KEY)
        assert stranger.code == 404

    async def seen(server: http_server.Server) -> None:
        (listed,) = json.loads((await server.ask("GET", "/checkpoints")).body)["checkpoints"]
        assert listed["tinker_path"] == told["tinker_path"]
        assert listed["size_bytes"] > 0
        assert listed["expires_at"]
        info = await server.post("/weights_info", {"tinker_path": told["tinker_path"]})
        assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("tuft/demo", 4, False)

    on_server(tmp_path, body)
    on_server(tmp_path, seen)


GOOD = adapter()
REFUSED = {
    "no base model": ("/tuft/adapters", GOOD, "base_model"),
    "an unknown base model": ("/tuft/adapters?base_model=no/such", GOOD, "no/such"),
    "a name that is none": (WHERE + "&name=../x", GOOD, "is not a checkpoint name"),
    "a time that is none": (WHERE + "&ttl_seconds=nan", GOOD, "ttl_seconds"),
    "an empty body": (WHERE, b"", "breaks off"),
    "no weights": (WHERE, packed({"adapter_config.json": b"{}"}), "adapter_model.safetensors missing"),
    "a pickle": (WHERE, packed({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}), "missing"),
    "another layer": (WHERE, adapter("model.layers.99.self_attn.q_proj"), "no linear layer of tuft/demo"),
    "another rank": (WHERE, adapter(r=8), "has rank 4"),
    "too high a rank": (WHERE, adapter(rank=65, r=65), r"outside 1..64"),
    "a body over the limit": (WHERE, bytes(2**21), "the limit of /tuft/adapters is 1048576"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_refused_upload_leaves_nothing_behind(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H7, F12, S1-34: no record, no file, no session; the reason and the way out."""
    monkeypatch.setattr(http_server, "handlers", lambda *args: tinker.handlers(*args, 2**20))
    path, content, said = REFUSED[name]

    async def body(server: http_server.Server) -> None:
        before = state_view(server.host.ledger.state)
        assert said in refusal(await server.ask("POST", path, content))
        assert state_view(server.host.ledger.state) == before
        root = server.host.service.checkpoints.root
        assert not root.exists() or not list(root.iterdir())

    on_server(tmp_path, body)


def test_an_upload_counts_towards_the_tenants_storage(tmp_path: Path) -> None:
    """One fits into 10,000 bytes, and then no other does; nothing of it stays."""

    async def body(server: http_server.Server) -> None:
        assert (await server.ask("POST", WHERE, adapter(), BOB_KEY)).code == 200
        before = state_view(server.host.ledger.state)
        assert "Checkpoint storage is full" in refusal(await server.ask("POST", WHERE, adapter(), BOB_KEY))
        assert state_view(server.host.ledger.state) == before
        assert len(list(server.host.service.checkpoints.root.iterdir())) == 1

    on_server(tmp_path, body, max_checkpoint_bytes=10_000)


def ask_lab(alice: Server, body: bytes, **headers: str) -> tuple[int, Any]:
    parts = urlsplit(alice.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request(
        "POST", f"{parts.path}tuft/lab/api/v1/tuft/adapters?base_model=tuft/demo&name=dropped", body, headers
    )
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers.get("Content-Type", "").startswith("application/json")
    return answer.status, json.loads(content) if is_json else content


def test_the_panel_uploads_under_jupyters_own_identity(alice: Server) -> None:
    """T5: a token of the server uploads; nobody, a cookie without XSRF header or a Tinker key do not."""
    status, told = ask_lab(alice, adapter(), Authorization=f"token {alice.token}")
    assert status == 200, told
    assert told["tinker_path"].endswith("/weights/dropped")
    status, told = ask_lab(alice, adapter(r=8), Authorization=f"token {alice.token}")
    assert status == 400
    assert "has rank 4" in told["detail"]
    for headers in ({}, {"X-API-Key": key_of(alice.work)}, {"Cookie": "_xsrf=x"}):
        assert ask_lab(alice, adapter(), **headers)[0] == 403


def test_an_upload_of_the_panel_that_breaks_off_leaves_no_file_open(alice: Server) -> None:
    """L7: what came of it takes no room on the disk any more."""
    server, address = psutil.Process(alice.pid), urlsplit(alice.url)
    alice.request("GET", "tuft/lab/state")
    before = server.num_fds()
    head = f"POST {address.path}tuft/lab/api/v1{WHERE} HTTP/1.1\r\nHost: {address.netloc}\r\n"
    head += f"Authorization: token {alice.token}\r\nContent-Length: 200000\r\n\r\n"
    for _ in range(10):
        with socket.create_connection((address.hostname, address.port), 30) as connection:
            connection.sendall(head.encode() + bytes(100_000))
            time.sleep(0.1)
    until(lambda: server.num_fds() < before + 5, 30, "what came is kept")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("trip", [trip.__name__ for trip in peft_trip.TRIPS])
def test_adapters_travel_between_peft_and_the_server(kernel: Kernel, trip: str) -> None:
    """S1-40: PEFT's own adapter continues training and is sampled; ours says the same in PEFT, to 1e-5."""
    kernel.run("%load_ext tuft_jupyter\n%tuft init\nfrom tests.support import peft_trip", timeout=180)
    kernel.run(f"peft_trip.{trip}()", timeout=180)
