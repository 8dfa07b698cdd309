"""Two Jupyter servers with one namespace in one Redis: one trains, the other sends clients there and takes over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import tinker
from tinker import types

from examples.run_on_server import Server
from tests.fault.kills import batch
from tests.support.live import ask, environment, key_of, sdk, until
from tests.support.redis_server import RedisServer

STEPS = 4


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    """The one that writes, and the one that came later."""
    redis = RedisServer(tmp_path / "redis").start()
    config = tmp_path / "tuft.yaml"
    config.write_text(
        "supported_models: [{model_name: tuft/demo, max_lora_rank: 64}]\n"
        f"persistence: {{mode: redis_url, redis_url: '{redis.url}', namespace: shared}}\n"
    )
    env = environment(tmp_path, TUFT_CONFIG=str(config), TUFT_TRAINER_THREADS="1")
    for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        made.append(Server(tmp_path, tmp_path / name, base_url=f"/{name}/", env=env))
    try:
        made[0].start()
        until(lambda: waiting(made[0], tmp_path) is None, 30, "the first server does not serve")
        made[1].start()
        yield made[0], made[1]
    finally:
        for server in made:
            server.stop()
        redis.stop()


def waiting(server: Server, home: Path) -> str | None:
    told: str | None = ask(f"{server.url}tuft", "tuft/status", key_of(home))["waiting_for"]
    return told


def steps(training: tinker.TrainingClient, rng: Random, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        passed = training.forward_backward(batch(rng), "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        losses.append(passed.metrics["loss:sum"])
    return losses


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_client_of_either_sees_the_same_run_and_goes_on_when_one_of_them_dies(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    """S1-52, F8: create on the second while the first writes, read on both, kill -9, train on: nothing done twice."""
    first, second = servers
    key = key_of(tmp_path)
    until(lambda: "is written by process" in str(waiting(second, tmp_path)), 30, "the second does not wait")
    with sdk(f"{second.url}tuft", key) as service:
        training = service.create_lora_training_client(base_model="tuft/demo", rank=4, seed=3).result()
        rng = Random(5)
        losses = steps(training, rng, STEPS)
        for server in servers:
            (run,) = ask(f"{server.url}tuft", "training_runs", key)["training_runs"]
            assert run["training_run_id"] == training.model_id
        first.kill()
        losses += steps(training, rng, STEPS)
        (run,) = second.request("GET", "tuft/lab/state")["state"]["runs"]
        assert (run["step"], len(run["curve"]["loss"]), run["pending"]) == (2 * STEPS, 2 * STEPS, 0)
        alone = service.create_lora_training_client(base_model="tuft/demo", rank=4, seed=3).result()
        assert steps(alone, Random(5), 2 * STEPS) == losses
