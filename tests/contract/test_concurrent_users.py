"""Several people at once, through the stock SDK against a real server: each gets what it gets alone."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from tinker import types

from examples.run_on_server import Server
from tests.support.live import TO_THE_END, ask, key_of, sdk, standing_still, until

pytestmark = pytest.mark.timeout(300)


def run_users(alice: Server, *arguments: str) -> str:
    key = (alice.work / "tuft" / "credentials").read_text().strip()
    address = f"{alice.url.rstrip('/')}/tuft"
    done = subprocess.run(
        [*TO_THE_END, "-m", "tuft_jupyter.testing.concurrent_users", *arguments],
        env={**os.environ, "TINKER_BASE_URL": address, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "healthz" in done.stdout
    return done.stdout


@pytest.mark.parametrize("users", [4, 16])
def test_users_at_once_all_succeed_with_the_losses_they_get_alone(alice: Server, users: int) -> None:
    """X10, S4-38, S4-39, S4-40: on the CPU, with the default backend; the report tells each user's time, the mean and
    the speedup.
    """
    told = run_users(alice, str(users))
    assert f"Successful: {users}, Failed: 0" in told
    assert len(re.findall(r"^user \d+: [\d.]+ s, loss ", told, re.MULTILINE)) == users
    assert re.search(r"Mean time per user: [\d.]+ s\nWall time: [\d.]+ s, speedup: [\d.]+x", told)


def test_twenty_steps_of_four_users_never_mix(alice: Server) -> None:
    """X11, S4-36: nobody's pass disturbs another's gradients, however their steps interleave."""
    assert "Successful: 4, Failed: 0" in run_users(alice, "4", "--steps", "20")


def test_two_users_with_full_queues_take_turns(alice: Server) -> None:
    """X11, S4-37: with ten passes of each queued, neither waits until the other's are done."""
    key, address = key_of(alice.work), f"{alice.url}tuft"
    with sdk(address, key) as client:
        tokens = list(range(200))
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": tokens, "weights": [1.0] * len(tokens)},
        )
        model = client.get_server_capabilities().supported_models[0].model_name
        runs = [
            client.create_lora_training_client(base_model=model, rank=4, seed=i).result() for i in range(2)
        ]
        for run in runs:
            run.forward_backward([datum], "cross_entropy").result()
        names = [run.model_id for run in runs]

        def all_wait() -> bool:
            listed = ask(address, "tuft/outlook", key)["runs"]
            return [run["pending"] for run in listed if run["id"] in names] == [10, 10]

        with standing_still(alice.pid, "TrainingActor"):  # nothing is done before all is queued
            queued = [run.forward_backward([datum] * 4, "cross_entropy") for run in runs for _ in range(10)]
            until(all_wait, 60, "ten passes of each are queued")
        for future in queued:
            future.result(timeout=200)
    ended = passes_done(alice.work / "tuft" / "journal.sqlite", names)[2:]
    ahead = [abs(ended[:n].count(0) - ended[:n].count(1)) for n in range(1, len(ended) + 1)]
    assert len(ended) == 20
    assert max(ahead) <= 3, ended


def passes_done(journal: Path, runs: list[str]) -> list[int]:
    """Whose passes the server ended, by number, in that order: when a client hears of it says less."""
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as opened:
        rows = opened.execute("SELECT data FROM records WHERE kind = 'op_done' ORDER BY n").fetchall()
    done = [json.loads(data) for (data,) in rows]
    return [runs.index(op["run"]) for op in done if op["op"] == "forward_backward" and op["run"] in runs]
