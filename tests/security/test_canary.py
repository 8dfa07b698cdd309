"""Secrets never leave: a server at its most talkative is given marked secrets, and everything it wrote is searched."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.live import ask, environment, listening, python
from tuft_jupyter.kernel import launch

pytestmark = pytest.mark.timeout(240)

KEY = "tml-ca11ab1eca11ab1eca11ab1eca11ab1e"
WRONG = "tml-0badc0de0badc0de0badc0de0badc0de"
PROMPT = "zanzibarcanaryprompt"
SECRETS = (KEY, KEY[4:], WRONG, WRONG[4:], PROMPT)

CLIENT = """
import os, sys, tinker
client = tinker.ServiceClient(base_url=sys.argv[1])
run = client.create_lora_training_client(base_model="tuft/demo", rank=4)
datum = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
)
run.forward_backward([datum], "cross_entropy").result()
run.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
print(run.save_state("mine").result().path)
"""


def test_marked_secrets_are_nowhere_in_what_a_server_writes_and_shows(tmp_path: Path) -> None:
    """T6, P5: logs at DEBUG, journal, files, process arguments, feed and metrics: 0 hits of keys, tokens, permissions
    to download and prompts; a crash would leave no core file. T11, M6: and beside a
    training and a sampling worker nothing, of Ray neither, listens beyond the loopback interface.
    """
    env = environment(tmp_path, TUFT_API_KEY=KEY, TUFT_LOG_LEVEL="debug")
    config = tmp_path / "tuft.yaml"
    journal = tmp_path / "tuft" / "journal.sqlite"
    config.write_text(
        "supported_models:\n  - model_name: tuft/demo\n"
        f"persistence:\n  mode: file_redis\n  file_path: {journal}\nlog_level: debug\n"
    )
    server = launch.start(config, env)
    try:
        made = ask(server.address, "tuft/keys", KEY, {"tenant": "carol"})
        done = python(CLIENT, {**env, "TINKER_API_KEY": made["key"]}, server.address)
        assert done.returncode == 0, done.stderr[-2000:]
        for key in (WRONG, f"{WRONG}\u00e9"):
            with pytest.raises((urllib.error.HTTPError, UnicodeEncodeError)):
                ask(server.address, "sessions", key)
        completion = {"model": "tuft/demo", "prompt": PROMPT, "max_tokens": 2}
        answer = _completion(server.address, made["key"], completion)
        assert answer["choices"]
        token, ticket = _signed(server.address, made["key"], done.stdout.strip())
        secrets = (*SECRETS, made["key"], made["key"][4:], token, ticket)
        shown = json.dumps(
            [
                ask(server.address, path, KEY)
                for path in ("tuft/state?tenant=*", "tuft/keys", "tuft/status", "audit")
            ]
        )
        shown += _metrics(server.address)
        arguments = " ".join(" ".join(_arguments(each)) for each in psutil.process_iter())
        assert not _open_to_others(server.process.pid)
        assert not _cores(server.process.pid)
        for secret in secrets:
            assert secret not in shown
            assert secret not in arguments
    finally:
        server.stop()
    searched = 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "credentials":
            content = path.read_bytes()
            searched += len(content)
            assert not [secret for secret in secrets if secret.encode() in content], path
    assert searched > 100_000
    assert "debug" in config.read_text()
    assert b"DEBUG tuft_jupyter" in server.log.read_bytes(), "the log was at its most talkative"


def _signed(address: str, key: str, path: str) -> tuple[str, str]:
    """A token that stands for the key, and the permission in the address of a download; both are used once."""
    token = ask(address, "auth/token", key, {})["jwt"]
    assert ask(address, "sessions", token)["sessions"]
    run, _, rest = path.removeprefix("tinker://").partition("/")
    url = ask(address, f"training_runs/{run}/checkpoints/{rest}/archive", key)["url"]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        assert len(answer.read()) > 1000
    return token, url.rpartition("/")[2]


def _cores(pid: int) -> list[int]:
    """Processes from a server's on down that would leave a core file when they crash."""
    found = []
    for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.rlimit(psutil.RLIMIT_CORE)[0] != 0:
                found.append(each.pid)
    return found


def _open_to_others(pid: int) -> list[tuple[int, str]]:
    """(port, interface) of listening sockets of a process and everything below it that others could reach."""
    below = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert any("raylet" in " ".join(_arguments(each)) for each in below), "Ray is there"
    sockets = [at for process in below for at in listening(process)]
    return [(at.port, at.ip) for at in sockets if not _loopback(at.ip)]


def _loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return address.is_loopback or bool(
        getattr(address, "ipv4_mapped", None) and address.ipv4_mapped.is_loopback
    )


def _arguments(process: psutil.Process) -> list[str]:
    """Those of another process; none of one that has ended meanwhile."""
    try:
        return process.cmdline() if process.pid != os.getpid() else []
    except psutil.Error:
        return []


def _completion(address: str, key: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        f"{address}/oai/api/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        return json.loads(answer.read())  # type: ignore[no-any-return]


def _metrics(address: str) -> str:
    request = urllib.request.Request(f"{address}/metrics", headers={"X-API-Key": KEY})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return str(answer.read().decode())
