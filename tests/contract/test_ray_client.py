"""A server that reaches its cluster by Ray Client (``ray://``), as one outside of a Kubernetes cluster does."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.live import environment, python, until
from tuft_jupyter.engine.ray_local import without_needless_import

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TRAIN = """
import tinker
from tinker import types

training = tinker.ServiceClient().create_lora_training_client("tuft/demo", rank=4, seed=1).result()
datum = types.Datum(
    model_input=types.ModelInput.from_ints([7] * 8), loss_fn_inputs={"target_tokens": [7] * 8}
)
losses = []
for _ in range(3):
    passed = training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    losses.append(passed.result().metrics["loss:sum"])
assert losses[-1] < losses[0], losses
drawn = training.save_weights_and_get_sampling_client().sample(
    types.ModelInput.from_ints([7] * 4), 1, types.SamplingParams(max_tokens=3, temperature=0.0)
)
print("DONE", drawn.result().sequences[0].tokens)
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        sockets = [open_.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def head() -> Iterator[str]:
    """The address of a head node's Ray Client server. Its processes are ended with it, by their ids."""
    port, client = free_ports(2)
    temp = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Ray puts sockets below it
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={temp}", "--num-cpus=4", "--num-gpus=0", "--include-dashboard=false"]
    path = os.pathsep.join(filter(None, [without_needless_import(temp), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with (temp / "head.txt").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command), "--disable-usage-stats"], env=env, stdout=log, stderr=log
        )
    try:
        until(lambda: _listens(client) or process.poll() is not None, 120, "the head node did not start")
        assert process.poll() is None, (temp / "head.txt").read_text()
        yield f"ray://127.0.0.1:{client}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(each.cmdline())
                if str(temp) in words or f":{port} " in words:
                    each.kill()
        shutil.rmtree(temp, ignore_errors=True)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def test_a_server_outside_the_cluster_trains_and_samples_in_it(head: str, tmp_path: Path) -> None:
    """S3-33, S3-38: with nothing set but the address; the stock SDK notices nothing."""
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    env = environment(
        tmp_path,
        RAY_ADDRESS=head,
        RAY_AUTH_MODE="disabled",
        TUFT_API_KEY="tml-here",
        TINKER_API_KEY="tml-here",
        TINKER_BASE_URL=address,
    )
    command = [sys.executable, "-m", "tuft_jupyter_server", "launch", f"--port={port}"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        until(lambda: _listens(port) or server.poll() is not None, 120, "the server did not start")
        done = python(TRAIN, env)
        assert "DONE [7, 7, 7]" in done.stdout, done.stderr[-2000:] + (tmp_path / "log").read_text()[-3000:]
    finally:
        server.terminate()
        server.wait(60)
    assert server.returncode == 0
