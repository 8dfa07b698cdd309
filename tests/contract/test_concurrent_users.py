"""Several people at once, through the stock SDK against a real server: each gets what it gets alone."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from tinker import types

from examples.run_on_server import Server
from tests.support.live import TO_THE_END, key_of, sdk


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
    with sdk(f"{alice.url}tuft", key_of(alice.work)) as client:
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
        queued = [[run.forward_backward([datum] * 4, "cross_entropy") for _ in range(10)] for run in runs]
        ended: list[int] = []

        def wait(user: int) -> None:
            for future in queued[user]:
                future.result(timeout=200)
                ended.append(user)

        threads = [threading.Thread(target=wait, args=(user,)) for user in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ahead = [abs(ended[:n].count(0) - ended[:n].count(1)) for n in range(1, len(ended) + 1)]
        assert len(ended) == 20
        assert max(ahead) <= 3, ended
