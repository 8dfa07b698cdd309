"""Weights that leave, over real HTTP: archives and exports behind signed addresses."""

from __future__ import annotations

import asyncio
import io
import json
import os
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyrage
import pytest
from tornado.httpclient import HTTPResponse

from tests.support.http_server import BOB_KEY, ROOT, Server, on_server, refusal
from tuft_jupyter.wire import archive, tickets

CONFIG, WEIGHTS = b'{"r": 8}', os.urandom(3 * archive.CHUNK + 7)


async def saved(server: Server, name: str = "n", verb: str = "/save_weights", **more: Any) -> str:
    """A checkpoint with the files that a training worker leaves, besides those of the scripted engine; its path."""
    run = await server.new_run()
    promise = await server.post(verb, {"model_id": run, "path": name, "seq_id": 1, **more})
    await server.post("/retrieve_future", {"request_id": promise["request_id"]})
    state = server.host.ledger.state
    (path,) = [c.path for c in state.checkpoints.values() if c.run == run]
    directory = Path(state.checkpoints[path].directory)
    for file, content in (("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS)):
        (directory / file).write_bytes(content)
    for file in ("optimizer.safetensors", "manifest.json"):
        (directory / file).write_bytes(b"ours")
    return path


def of(path: str) -> str:
    """The route's path of a checkpoint."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    return f"/training_runs/{run}/checkpoints/{kind}/{name}"


async def fetch(server: Server, url: str) -> HTTPResponse:
    """As ``urllib`` would: without any header of ours."""
    return await server.client.fetch(url, raise_error=False)


def test_an_archive_is_a_plain_peft_directory_behind_an_address_that_needs_no_key(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        path = await saved(server)
        told = json.loads((await server.ask("GET", of(path) + "/archive")).body)
        assert told["url"].startswith(f"http://127.0.0.1:{server.port}{ROOT}/tuft/files/")
        assert told["expires"].endswith("+00:00")
        response = await fetch(server, told["url"])
        assert response.code == 200
        assert int(response.headers["Content-Length"]) == len(response.body)
        with tarfile.open(fileobj=io.BytesIO(response.body)) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
        assert found == {
            "adapter_config.json": CONFIG,
            "adapter_model.safetensors": WEIGHTS,
            "checkpoint_complete": b"",
        }

    on_server(tmp_path, body)


def test_an_sdk_that_asks_for_gzip_is_redirected_to_the_archive(tmp_path: Path) -> None:
    """SDK 0.16 sends two Accept headers, and reads Location and Expires of a 302."""

    async def body(server: Server) -> None:
        path = await saved(server)
        url = f"http://127.0.0.1:{server.port}{ROOT}{of(path)}/archive"
        headers = {"X-API-Key": server.host.key, "Accept": "application/json,application/gzip"}
        response = await server.client.fetch(url, headers=headers, follow_redirects=False, raise_error=False)
        assert response.code == 302
        assert response.headers["Expires"].endswith("GMT")
        assert (await fetch(server, response.headers["Location"])).code == 200

    on_server(tmp_path, body)


def test_only_the_owner_or_anybody_once_it_is_published_gets_an_address(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        path = await saved(server)
        refused = await server.ask("GET", of(path) + "/archive", key=BOB_KEY)
        missing = await server.ask("GET", of(path) + "x/archive", key=BOB_KEY)
        assert refused.code == missing.code == 404
        assert refusal(refused).replace(path, "X") == refusal(missing).replace(path + "x", "X")
        assert (await server.ask("POST", of(path) + "/publish")).code == 200
        assert (await server.ask("GET", of(path) + "/archive", key=BOB_KEY)).code == 200

    on_server(tmp_path, body)


def test_an_address_that_was_changed_expired_or_outlived_its_weights_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        path = await saved(server)
        good = json.loads((await server.ask("GET", of(path) + "/archive")).body)["url"]
        head, payload, signature = good.rsplit(".", 2)
        for forged in (
            f"{head}.{payload}.{signature[::-1]}",
            f"{head}.{payload[:-2]}AA.{signature}",
            good[:-9],
        ):
            refused = await fetch(server, forged)
            assert refused.code == 403
            refusal(refused)
        monkeypatch.setattr(tickets, "TICKET_SECONDS", -1)
        old = json.loads((await server.ask("GET", of(path) + "/archive")).body)["url"]
        assert "expired" in refusal(await fetch(server, old))
        assert (await fetch(server, good)).code == 200
        assert (await server.ask("DELETE", of(path))).code == 200
        assert (await fetch(server, good)).code == 404

    on_server(tmp_path, body)


def test_the_signing_secret_is_private_and_never_sent(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        file = tmp_path / "signing_secret"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        url = json.loads((await server.ask("GET", of(await saved(server)) + "/archive")).body)["url"]
        assert file.read_text().strip() not in url

    on_server(tmp_path, body)


async def files_of(server: Server, path: str) -> dict[str, bytes]:
    told = json.loads((await server.ask("GET", of(path) + "/external_weights_urls")).body)
    assert told["expires"].endswith("+00:00")
    return {name: (await fetch(server, url)).body for name, url in told["urls"].items()}


def test_an_export_is_fetched_file_by_file(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        path = await saved(server, verb="/save_weights_external")
        assert path.split("/")[-2:] == ["external_weights", "n"]
        assert await files_of(server, path) == {
            "adapter_config.json": CONFIG,
            "adapter_model.safetensors": WEIGHTS,
        }
        (listed,) = json.loads((await server.ask("GET", "/checkpoints")).body)["checkpoints"]
        assert listed["checkpoint_type"] == "external"
        training = await saved(server)
        refused = await server.ask("GET", of(training) + "/external_weights_urls")
        assert "is no export" in refusal(refused)

    on_server(tmp_path, body)


def test_an_export_for_recipients_leaves_only_encrypted(tmp_path: Path) -> None:
    """As the cookbook's weights.download asks for it: names end in .age, and its key alone opens them."""
    identity = pyrage.x25519.Identity.generate()

    async def body(server: Server) -> None:
        more = {"age_encryption_recipients": [str(identity.to_public())]}
        path = await saved(server, verb="/save_weights_external", **more)
        both = await asyncio.gather(files_of(server, path), files_of(server, path))
        assert both[0] == both[1]
        assert WEIGHTS[:64] not in both[0]["adapter_model.safetensors.age"]
        opened = {name: pyrage.decrypt(content, [identity]) for name, content in both[0].items()}
        assert opened == {"adapter_config.json.age": CONFIG, "adapter_model.safetensors.age": WEIGHTS}
        directory = Path(server.host.ledger.state.checkpoints[path].directory)
        assert not (directory / "adapter_model.safetensors").exists()
        assert "encrypted export" in refusal(await server.ask("GET", of(path) + "/archive"))

    on_server(tmp_path, body)


def test_a_recipient_that_is_none_is_refused_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        asked = {"model_id": await server.new_run(), "path": "n", "seq_id": 1}
        for recipient in ("nonsense", "age1nonsense", "ssh-rsa nonsense", ""):
            sent = {**asked, "age_encryption_recipients": [recipient]}
            refused = await server.ask("POST", "/save_weights_external", sent)
            assert "age_encryption_recipients: " in refusal(refused)
        monkeypatch.setitem(sys.modules, "pyrage", None)
        refused = await server.ask("POST", "/save_weights_external", sent)
        assert "pip install pyrage" in refusal(refused)
        assert not server.host.ledger.state.checkpoints

    on_server(tmp_path, body)
