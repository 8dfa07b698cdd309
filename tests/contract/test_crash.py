"""Kill -9 in the middle of a run: the same client goes on, and nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from examples.run_on_server import Server
from tests.contract.conftest import OURS, clean_environment
from tests.support.live import TO_THE_END, below

SCRIPT = Path(__file__).parents[1] / "support" / "crash_script.py"
STEPS = 30
TOLERANCE = 1e-4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that may be killed and started again at the same address."""
    (tmp_path / "root").mkdir()
    for name in OURS:
        os.environ.pop(name, None)
    made = Server(tmp_path / "root", tmp_path, base_url="/user/alice/", env=clean_environment(tmp_path))
    with made:
        made.port = urlsplit(made.url).port or 0
        yield made


def train(server: Server, at: dict[int, Callable[[], None]]) -> dict[str, Any]:
    """Run the script; call ``at[step]`` when it has reported that step. Returns what it printed last."""
    key = (Path(server.env["TUFT_HOME"]) / "credentials").read_text().strip()
    env = {**os.environ, **server.env, "TINKER_BASE_URL": f"{server.url}tuft", "TINKER_API_KEY": key}
    with subprocess.Popen(
        [*TO_THE_END, str(SCRIPT), str(STEPS)], env=env, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        last: dict[str, Any] = {}
        for line in script.stdout:
            last = json.loads(line)
            if last.get("step") in at:
                at[last["step"]]()
    assert script.returncode == 0
    return last


def shown(server: Server, run: str) -> dict[str, Any]:
    state = server.request("GET", "tuft/lab/state")["state"]
    return next(each for each in state["runs"] if each["id"] == run)


def close(left: Any, right: Any) -> bool:
    return bool(left == pytest.approx(right, rel=TOLERANCE, abs=TOLERANCE))


@pytest.mark.timeout(400)
def test_the_same_cell_goes_on_after_kill_9_of_the_server_and_of_a_worker(server: Server) -> None:
    """F1, F2, S1-48, P1: the losses, the final weights and the step count equal the uninterrupted run's."""

    def kill_server() -> None:
        server.kill()
        server.start()

    def kill_trainer() -> None:
        trainers = below(server.pid, "TrainingActor")
        assert trainers
        for trainer in trainers:
            with contextlib.suppress(psutil.Error):
                trainer.kill()

    calm = train(server, {})
    hit = train(server, {7: kill_server, 15: kill_trainer, 22: kill_server})
    assert close(hit["losses"], calm["losses"])
    assert all(close(one, other) for one, other in zip(hit["logprobs"], calm["logprobs"], strict=True))
    run = shown(server, hit["run"])
    assert (run["step"], run["pending"]) == (STEPS, 0)
    assert len(run["curve"]["loss"]) == STEPS
    assert run["tokens"] == shown(server, calm["run"])["tokens"]
