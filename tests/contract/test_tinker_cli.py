"""Every sub-command of the SDK's own ``tinker`` command, against a real Jupyter server."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from tinker.cli.__main__ import main_cli

from examples.run_on_server import Server
from tests.contract.conftest import clean_environment
from tests.support.live import TO_THE_END
from tuft_jupyter import home as homes

pytestmark = pytest.mark.timeout(300)
CLI = Path(sys.executable).with_name("tinker")
SECONDS = 120

Tinker = Callable[..., subprocess.CompletedProcess[str]]

PREPARE = """
import json, tinker
from tinker import types
client = tinker.ServiceClient(user_metadata={"who": "cli"})
run = client.create_lora_training_client(base_model="tuft/demo", rank=8)
ids = [101, 42, 37, 102, 9, 17, 256]
datum = types.Datum(
    model_input=types.ModelInput.from_ints(ids[:-1]),
    loss_fn_inputs={"target_tokens": types.TensorData(data=ids[1:], dtype="int64", shape=[6])},
)
passed = run.forward_backward([datum], "cross_entropy")
run.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=120)
made = {"run": run.model_id, "session": run.model_id.split(":")[0]}
made["path"] = run.save_state("kept").result(timeout=120).path
made["gone"] = run.save_state("gone").result(timeout=120).path
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def environment(alice: Server) -> dict[str, str]:
    key = homes.ensure_key(alice.work / "tuft")
    ours = clean_environment(alice.work)
    return {
        **os.environ,
        **ours,
        "HOME": str(alice.work),
        "TINKER_BASE_URL": f"{alice.url}tuft",
        "TINKER_API_KEY": key,
        "COLUMNS": "250",
    }


@pytest.fixture(scope="module")
def tinker(environment: dict[str, str]) -> Tinker:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [*TO_THE_END, str(CLI), *arguments]
        return subprocess.run(
            command, env={**environment, **env}, capture_output=True, text=True, timeout=SECONDS, check=False
        )

    return run


@pytest.fixture(scope="module")
def made(environment: dict[str, str]) -> dict[str, str]:
    """A run of one step with two training checkpoints."""
    done = subprocess.run(
        [*TO_THE_END, "-c", PREPARE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def shown(tinker: Tinker, *arguments: str) -> Any:
    done = tinker("-f", "json", *arguments)
    said(done)
    return json.loads(done.stdout)


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The sub-commands of a command that do something themselves."""
    if not isinstance(command, click.Group):
        yield words
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from leaves(found, (*words, name))


def test_every_sub_command_of_this_sdk_is_tried_here() -> None:
    """A sub-command that a newer SDK brings fails this test until it is tried."""
    tried: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(Path(__file__).read_text())):
        parts = [*node.args] if isinstance(node, ast.Call) else getattr(node, "elts", [])
        words = [
            part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        tried |= {tuple(words[at : at + size]) for at in range(len(words)) for size in (1, 2)}
    looped = {("checkpoint", "publish"), ("checkpoint", "unpublish")}  # by one loop over both
    commands = set(leaves(main_cli))
    assert len(commands) >= 18
    assert commands - tried - looped == set()


def test_version(tinker: Tinker) -> None:
    assert said(tinker("version")).startswith("tinker ")


def test_model_list(tinker: Tinker) -> None:
    assert "tuft/demo" in said(tinker("model", "list"))
    assert "tuft/demo" in said(tinker("model", "list", "DEMO"))


def test_run_list_and_info(tinker: Tinker, made: dict[str, str]) -> None:
    assert made["run"] in said(tinker("run", "list"))
    info = said(tinker("run", "info", made["run"]))
    assert "tuft/demo" in info
    assert "LoRA" in info


def test_checkpoint_list_and_info(tinker: Tinker, made: dict[str, str]) -> None:
    assert made["path"] in said(tinker("checkpoint", "list"))
    assert made["path"] in said(tinker("checkpoint", "list", "--run-id", made["run"]))
    assert "weights/kept" in said(tinker("checkpoint", "info", made["path"]))


def test_checkpoint_publish_and_unpublish(tinker: Tinker, made: dict[str, str]) -> None:
    for verb, public in (("publish", True), ("unpublish", False)):
        said(tinker("checkpoint", verb, made["path"]))
        info = shown(tinker, "checkpoint", "info", made["path"])
        assert info["public"] is public


def test_checkpoint_set_ttl(tinker: Tinker, made: dict[str, str]) -> None:
    said(tinker("checkpoint", "set-ttl", made["path"], "--ttl", "7200"))
    assert shown(tinker, "checkpoint", "info", made["path"])["expires_at"]
    said(tinker("checkpoint", "set-ttl", made["path"], "--remove"))
    assert shown(tinker, "checkpoint", "info", made["path"])["expires_at"] is None


def test_checkpoint_download(tinker: Tinker, made: dict[str, str], tmp_path: Path) -> None:
    """What arrives is a plain PEFT directory, and the temporary export is gone."""
    said(tinker("checkpoint", "download", made["path"], "--output", str(tmp_path)))
    (directory,) = tmp_path.iterdir()
    assert {file.name for file in directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 8
    assert "external_weights" not in said(tinker("checkpoint", "list", "--limit", "0"))


def test_checkpoint_delete(tinker: Tinker, made: dict[str, str]) -> None:
    assert "Deleted 1" in said(tinker("checkpoint", "delete", made["gone"], "--yes"))
    listed = said(tinker("checkpoint", "list", "--limit", "0"))
    assert made["gone"] not in listed
    assert made["path"] in listed


def test_checkpoint_push_hf_says_what_the_hub_wants(tinker: Tinker, made: dict[str, str]) -> None:
    """Without an account of the hub the command ends before it asks us; the download is the same as above."""
    assert "Not logged in" in said(tinker("checkpoint", "push-hf", made["path"], "--repo", "a/b"), 1)


def test_session_export_trace_says_why_there_is_none(tinker: Tinker, made: dict[str, str]) -> None:
    assert "records no traces" in said(tinker("session", "export-trace", made["session"]), 1)


def test_auth_status_and_whoami(tinker: Tinker, environment: dict[str, str]) -> None:
    assert "Tinker accessible: yes" in said(tinker("auth", "status"))
    assert "Tinker accessible: no" in said(tinker("auth", "status", TINKER_API_KEY="tml-wrong"), 1)
    assert "plain API key" in said(tinker("auth", "whoami"), 1)
    address = f"{environment['TINKER_BASE_URL']}/api/v1/auth/token"
    request = urllib.request.Request(address, b"{}", {"X-API-Key": environment["TINKER_API_KEY"]})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        token = json.loads(answer.read())["jwt"]
    assert "tuft:tenant:" in said(tinker("auth", "whoami", TINKER_API_KEY=token))


def test_auth_login_and_logout(environment: dict[str, str], tmp_path: Path) -> None:
    env = {**environment, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    key = env.pop("TINKER_API_KEY")
    for command, answer in ((["auth", "login"], "Logged in as"), (["auth", "logout"], "Removed credential")):
        done = subprocess.run(
            [*TO_THE_END, str(CLI), *command],
            env=env,
            input=key + "\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert answer in said(done)


def test_billing_usage_and_checkpoint_storage(tinker: Tinker, made: dict[str, str]) -> None:
    now = datetime.fromtimestamp(time.time(), UTC)
    window = [(now + timedelta(hours=h)).strftime("%Y-%m-%dT%H:00:00Z") for h in (-1, 1)]
    events = shown(tinker, "billing", "usage", *window)["data"]
    trained = [e["event_info"]["token_count"] for e in events if e["event_info"]["type"] == "training"]
    assert sum(trained) >= 6
    assert "training" in said(tinker("billing", "usage", *window))
    storage = shown(tinker, "billing", "checkpoint-storage")["data"]
    kept = shown(tinker, "checkpoint", "list", "--limit", "0")["checkpoints"]
    assert made["path"] in [checkpoint["tinker_path"] for checkpoint in kept]
    assert sum(item["checkpoint_count"] for item in storage) == len(kept)
