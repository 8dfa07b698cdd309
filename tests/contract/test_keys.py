"""Keys over real HTTP: made and revoked by admins, gone within a second wherever they are in use."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from examples.run_on_server import Server as JupyterServer
from tests.support.http_server import BOB_KEY, ROOT, Server, on_server, refusal
from tests.support.live import environment, python
from tests.support.loops import at_best
from tuft_jupyter.core.journal_sqlite import SqliteJournal

PARKED = 100
LAB_KEYS = "tuft/lab/api/v1/tuft/keys"


async def parked(server: Server, key: str) -> list[asyncio.Task[object]]:
    """As many polls as PARKED for an answer that does not come."""
    run = await server.new_run(key)
    server.host.engines.trainer.gate.clear()
    step = {"model_id": run, "seq_id": 2, "adam_params": {"learning_rate": 1e-4}}
    promise = await server.post("/optim_step", step, key)
    server.client.close()
    server.client = type(server.client)(force_instance=True, max_clients=PARKED + 10)
    asking = [
        asyncio.ensure_future(
            server.ask("POST", "/retrieve_future", {"request_id": promise["request_id"]}, key)
        )
        for _ in range(PARKED)
    ]
    waiting = server.host.ledger.promises._promises[promise["request_id"]]
    while waiting.waiters is None or len(waiting.waiters._waiters) < PARKED:  # noqa: ASYNC110 - they park one by one
        await asyncio.sleep(0.01)
    return asking


def test_a_revoked_key_stops_within_a_second_also_where_a_hundred_polls_are_parked(tmp_path: Path) -> None:
    """T7."""

    async def body(server: Server) -> None:
        async def revoked() -> float:
            made = await server.post("/tuft/keys", {"tenant": "carol", "name": "laptop"})
            asking = await parked(server, made["key"])
            began = time.monotonic()
            assert (await server.ask("DELETE", f"/tuft/keys/{made['id']}")).code == 200
            answers = await asyncio.gather(*asking)
            took = time.monotonic() - began
            assert {answer.code for answer in answers} == {403}
            assert "revoked" in refusal(answers[0])
            assert (await server.ask("GET", "/sessions", key=made["key"])).code == 403
            server.host.engines.trainer.gate.set()
            return took

        assert await at_best(revoked, 1.0) < 1.0

    on_server(tmp_path, body)


def test_a_key_that_expires_ends_parked_polls_too(tmp_path: Path) -> None:
    """T7."""

    async def body(server: Server) -> None:
        async def expired() -> float:
            made = await server.post("/tuft/keys", {"tenant": "carol"})
            asking = await parked(server, made["key"])
            changed = await server.ask("PUT", f"/tuft/keys/{made['id']}", {"ttl_seconds": 0.2})
            assert changed.code == 200
            began = time.monotonic()
            answers = await asyncio.gather(*asking)
            took = time.monotonic() - began
            assert {answer.code for answer in answers} == {403}
            server.host.engines.trainer.gate.set()
            return took

        assert await at_best(expired, 1.2) < 1.2

    on_server(tmp_path, body)


@pytest.mark.parametrize("asked", ["GET /tuft/feed", "POST /create_session"])
def test_a_key_that_ends_while_its_request_is_still_arriving_gets_nothing(asked: str, tmp_path: Path) -> None:
    """T7: a body may take an hour; whoever was let in by the head is asked again when it is there."""
    method, path = asked.split()

    async def body(server: Server) -> None:
        made = await server.post("/tuft/keys", {"tenant": "carol"})
        head = f"{method} {ROOT}{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {made['key']}\r\nContent-Length: 2\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head.encode() + b"{")
        while not server.host.service.state.keys:  # noqa: ASYNC110 - until the journal has the key
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the head is read by now; were it not, the answer would be the same
        assert (await server.ask("DELETE", f"/tuft/keys/{made['id']}")).code == 200
        before = server.host.ledger.state.n
        writer.write(b"}")
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403")
        assert server.host.ledger.state.n == before
        writer.close()

    on_server(tmp_path, body)


def test_a_key_that_is_revoked_while_its_end_is_moved_stays_revoked(tmp_path: Path) -> None:
    """T7: for good, whoever asks for what meanwhile."""

    async def body(server: Server) -> None:
        made = await server.post("/tuft/keys", {"tenant": "carol"})
        path = f"/tuft/keys/{made['id']}"
        moved = {"ttl_seconds": 3600}
        await asyncio.gather(server.ask("DELETE", path), *(server.ask("PUT", path, moved) for _ in range(20)))
        assert (await server.ask("GET", "/sessions", key=made["key"])).code == 403

    on_server(tmp_path, body)


def test_tenants_see_their_own_keys_and_only_admins_make_them(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        made = await server.post("/tuft/keys", {"tenant": "bob", "ttl_seconds": 3600})
        own = json.loads((await server.ask("GET", "/tuft/keys", key=BOB_KEY)).body)["keys"]
        assert {key["tenant"] for key in own} == {"bob"}
        assert len(own) == 2
        assert "tml-" not in json.dumps(own)
        assert "admins" in refusal(await server.ask("POST", "/tuft/keys", {"tenant": "bob"}, BOB_KEY))
        server_key = next(
            key["id"]
            for key in json.loads((await server.ask("GET", "/tuft/keys")).body)["keys"]
            if key["source"] == "server"
        )
        foreign = await server.ask("DELETE", f"/tuft/keys/{server_key}", key=BOB_KEY)
        missing = await server.ask("DELETE", "/tuft/keys/0123456789ab", key=BOB_KEY)
        assert (foreign.code, missing.code) == (404, 404)
        assert refusal(foreign).replace(server_key, "0123456789ab") == refusal(missing)
        assert (await server.ask("DELETE", f"/tuft/keys/{made['id']}", key=BOB_KEY)).code == 200

    on_server(tmp_path, body)


def test_keys_are_made_at_the_command_line_with_and_without_a_running_server(tmp_path: Path) -> None:
    """T7; `tuft keys` writes the journal of a server that is down, and asks one that runs."""
    env = environment(tmp_path)
    cli = "import sys; from tuft_jupyter.cli import main; sys.exit(main(sys.argv[1:]))"
    made = python(cli, env, "keys", "create", "bob", "--expires", "30d", "--offline")
    assert made.returncode == 0, made.stderr
    key = made.stdout.removesuffix("\n")
    assert re.fullmatch(r"tml-[0-9a-f]+", key), "a script reads it from stdout, which holds nothing else"
    assert "refuses" not in made.stderr
    named = python(cli, env, "keys", "list", "--offline").stdout
    assert "bob" in named
    assert key not in named

    async def body(server: Server) -> None:
        assert (await server.ask("GET", "/sessions", key=key)).code == 200
        number = next(line.split()[0] for line in named.splitlines() if "bob" in line)
        root = f"http://127.0.0.1:{server.port}/user/alice/tuft"
        address = ("--address", root)
        with_key = {**env, "TUFT_API_KEY": server.host.key}
        done = await asyncio.to_thread(python, cli, with_key, "keys", "revoke", number, *address)
        assert done.returncode == 0, done.stderr
        assert (await server.ask("GET", "/sessions", key=key)).code == 403
        again = await asyncio.to_thread(python, cli, with_key, "keys", "revoke", "nobody", *address)
        assert again.returncode == 1
        assert "does not exist" in again.stderr
        locked = await asyncio.to_thread(python, cli, env, "keys", "list", "--offline")
        assert locked.returncode == 1
        assert "Traceback" not in locked.stderr

    on_server(tmp_path / "tuft", body)


def test_what_a_server_writes_is_its_owner_s_alone(tmp_path: Path) -> None:
    """P5: whatever the umask says; bodies of requests stand in the journal."""
    old = os.umask(0o000)
    try:

        async def body(server: Server) -> None:
            await server.new_run()
            assert isinstance(server.host.journal, SqliteJournal)

        on_server(tmp_path / "tuft", body)
    finally:
        os.umask(old)
    home = tmp_path / "tuft"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    found = [path for path in home.iterdir() if path.is_file() and path.suffix != ".lock"]
    assert {path.name for path in found} >= {"credentials", "signing_secret", "journal.sqlite"}
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((home / "checkpoints").stat().st_mode) == 0o700


def test_the_lab_makes_and_revokes_keys_under_jupyter_s_own_protection(alice: JupyterServer) -> None:
    """T5: the lab's routes check Jupyter's identity and its XSRF token."""
    made = alice.request("POST", LAB_KEYS, {"tenant": "dave", "name": "from the lab"})
    assert made["key"].startswith("tml-")
    listed = alice.request("GET", LAB_KEYS)["keys"]
    assert "from the lab" in {key["name"] for key in listed}
    assert alice.request("PUT", f"{LAB_KEYS}/{made['id']}", {"ttl_seconds": 60})["expires"] > time.time()
    assert alice.request("DELETE", f"{LAB_KEYS}/{made['id']}") == {}
    for headers in ({}, {"X-API-Key": made["key"]}, {"Origin": "http://trusted.example.com.evil.com"}):
        request = urllib.request.Request(
            f"{alice.url}{LAB_KEYS}", data=b'{"tenant": "eve"}', headers=headers, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
        assert refused.value.code in (403, 404), headers  # a foreign origin is told of no such page
    assert "eve" not in {key["tenant"] for key in alice.request("GET", LAB_KEYS)["keys"]}


@pytest.mark.parametrize("jump", [86400.0, -86400.0])
def test_a_clock_that_is_set_ends_no_key_and_makes_none_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """F18: a machine that slept, or was started with a wrong clock, counts the seconds of a new key from now on."""

    async def body(server: Server) -> None:
        async def made() -> str:
            wish = {"tenant": "carol", "ttl_seconds": 60}
            return str((await server.post("/tuft/keys", wish))["key"])

        keys, wall = [await made()], time.time
        monkeypatch.setattr(time, "time", lambda: wall() + jump)
        keys.append(await made())
        server.host.keys.expire()
        assert [(await server.ask("GET", "/sessions", key=key)).code for key in keys] == [200, 200]
        later = server.host.ledger.clock() + 61
        monkeypatch.setattr(server.host.ledger, "clock", lambda: later)
        assert [(await server.ask("GET", "/sessions", key=key)).code for key in keys] == [403, 403]

    on_server(tmp_path, body)
