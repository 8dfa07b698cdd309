"""Engines as real Ray actors: what they promise about numbers, death, ports and leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tinker import types as sdk
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tests.support import actors
from tests.support.sdk_bodies import sdk_body
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import Settings
from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import PROTOBUF, ModelCard, OpKind
from tuft_jupyter.engine import ray_place, standby
from tuft_jupyter.engine.actors import SECRETS
from tuft_jupyter.engine.cluster import (
    ClusterSamplingEngine,
    ClusterTrainingEngine,
    Engines,
)
from tuft_jupyter.engine.ray_local import log_tail

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
RUN = "s:train:0"
LORA = {"rank": 4, "alpha": 8.0, "seed": 1}
ADAM = {"learning_rate": 1e-2}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


CANARY = "tml-canary"
"""The value of every secret in the environment that Ray is started from."""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return models.resolve(str(make_model(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="module")
def settings(ray_home: Path) -> Settings:
    return Settings(
        home=ray_home, checkpoint_dir=ray_home / "checkpoints", trainer_threads=1, standby_worker=False
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the module: Ray is started once."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engines(settings: Settings, runner: asyncio.Runner) -> Iterator[Engines]:
    """Engines whose Ray stays up between the tests, and is gone without a trace after them."""
    others = {*psutil.Process().children(recursive=True)}  # servers of other tests
    made = Engines(settings)
    keeper = object()
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, CANARY)
        runner.run(made._runtime.acquire(keeper))
    processes = {*psutil.Process().children(recursive=True)} - others
    yield made
    runner.run(made._runtime.release(keeper))
    assert not [process for process in processes if _runs(process)]


@pytest.fixture
def training(engines: Engines, card: ModelCard, runner: asyncio.Runner) -> Iterator[ClusterTrainingEngine]:
    engine = engines.training(card)
    yield engine
    runner.run(engine.stop())


@pytest.fixture
def sampling(engines: Engines, card: ModelCard, runner: asyncio.Runner) -> Iterator[ClusterSamplingEngine]:
    engine = engines.sampling(card)
    yield engine
    runner.run(engine.stop())


def create() -> Task:
    return Task("create", RUN, OpKind.CREATE_MODEL, {"lora": LORA})


def forward_backward(*tokens: int, key: str = "pass") -> Task:
    targets = list(tokens)
    datum = sdk.Datum(
        model_input=sdk.ModelInput.from_ints(targets), loss_fn_inputs={"target_tokens": targets}
    )
    return Task(key, RUN, OpKind.FORWARD_BACKWARD, {}, sdk_body([datum]), PROTOBUF, 1 << 20)


def optim_step(key: str = "step") -> Task:
    return Task(key, RUN, OpKind.OPTIM_STEP, {"adam": ADAM})


def sample_body(*prompt: int, max_tokens: int = 4) -> bytes:
    return json.dumps(
        {
            "prompt": {"chunks": [{"tokens": list(prompt), "type": "encoded_text"}]},
            "num_samples": 2,
            "sampling_params": {"max_tokens": max_tokens, "temperature": 0.0, "stop": []},
        }
    ).encode()


def good(outcome: Outcome) -> Outcome:
    assert outcome.category == "", outcome.error
    return outcome


async def until_dead(engine: ClusterTrainingEngine | ClusterSamplingEngine, call: Any) -> float:
    """Kill the engine's process during a call; seconds until the call says so."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
    waiting = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    os.kill(engine.pid, signal.SIGKILL)
    began = time.perf_counter()
    with pytest.raises(EngineDied, match="is gone"):
        await waiting
    return time.perf_counter() - began


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_training_through_an_actor_equals_training_in_this_process(
    training: ClusterTrainingEngine, card: ModelCard, runner: asyncio.Runner
) -> None:
    """S3-01, S3-07: the actor only carries; also after a kill -9, which is noticed at once."""
    import torch

    from tuft_jupyter.engine.trainer import PeftTrainer
    from tuft_jupyter.engine.worker import TrainingWorker

    tasks = [create(), forward_backward(5, 6, 7, 8), optim_step(), forward_backward(5, 6, 7, 8, key="again")]
    here = TrainingWorker(PeftTrainer(card.path, name=card.name, dtype=torch.float32, device="cpu")).step(
        tasks
    )
    wanted = [deserialize_forward_backward_output(good(here[i]).result) for i in (1, 3)]
    assert wanted[1].metrics["loss:sum"] < wanted[0].metrics["loss:sum"]

    async def scenario() -> None:
        await training.start()
        for _ in range(2):
            there = await training.step(tasks)
            for i, expected in zip((1, 3), wanted, strict=True):
                got = deserialize_forward_backward_output(good(there[i]).result)
                assert got.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
            assert await until_dead(training, training.step([optim_step()])) < 1.0
            with pytest.raises(EngineDied):
                await training.step([optim_step()])
            assert training.resources() == {}
            await training.start()
        (missing,) = await training.step([optim_step()])
        assert missing.category == "user"  # the new worker knows nothing of the old one's runs

    runner.run(scenario())


def test_sampling_cancelling_and_dying_through_an_actor(
    sampling: ClusterSamplingEngine, runner: asyncio.Runner, tmp_path: Path
) -> None:
    async def scenario() -> None:
        await sampling.start()
        outcomes = await asyncio.gather(
            *(sampling.sample(f"r{i}", None, sample_body(5, 6, i)) for i in range(8))
        )
        for outcome in outcomes:
            first, second = deserialize_sample_response(good(outcome).result).sequences
            assert first.tokens == second.tokens
            assert len(first.tokens) == 4
        assert (await sampling.sample("x", str(tmp_path / "none"), sample_body(5))).category == "user"
        cancelled = asyncio.create_task(sampling.sample("long", None, sample_body(5, max_tokens=500)))
        await sampling.sample("short", None, sample_body(5))
        await sampling.cancel("long")
        assert (await cancelled).category == "user"
        assert await until_dead(sampling, sampling.sample("long", None, sample_body(5, max_tokens=400))) < 1.0
        await sampling.start()
        again = await sampling.sample("r0", None, sample_body(5, 6, 0))
        sampled = [
            deserialize_sample_response(good(o).result).sequences[0].tokens for o in (again, outcomes[0])
        ]
        assert sampled[0] == sampled[1]

    runner.run(scenario())


def test_only_loopback_listens_and_secrets_are_ours_alone(
    training: ClusterTrainingEngine, settings: Settings, runner: asyncio.Runner
) -> None:
    """M6, P5, S3-23, S3-31, S3-32: no port is open, the token is ours, kernels and workers get no secrets of others."""
    training.actor_class = actors.FaultyTrainingActor
    runner.run(training.start())
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= LOOPBACK

    raylet = next(process for process in processes if process.name() == "raylet")
    environment = raylet.environ()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.is_relative_to(settings.home)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() not in " ".join(" ".join(process.cmdline()) for process in processes)
    temp = ray_place.temp_dir()
    assert temp.name == f"ray_{os.getuid()}"
    assert stat.S_IMODE(temp.stat().st_mode) == 0o700
    assert not [name for name in os.environ if name.startswith("RAY_AUTH") or name == "RAY_ADDRESS"]

    import ray

    assert ray.get_runtime_context().namespace == "tuft"
    shown = training.resources()
    assert shown["pid"] in {process.pid for process in processes}
    assert shown["rss_bytes"] > 1 << 20
    assert (shown["device"], shown["threads"]) == ("cpu", 1)
    assert CANARY not in psutil.Process(training.pid).environ().values()


def test_many_starts_at_once_are_one_ray_and_the_loop_stays_free(
    engines: Engines, runner: asyncio.Runner
) -> None:
    """S3-21: a second session would say so, and nothing here blocks the event loop."""

    async def scenario() -> None:
        sessions, lag = await asyncio.gather(
            asyncio.gather(*(engines._runtime.acquire(i) for i in range(10))), _worst_lag(20)
        )
        assert len(set(map(id, sessions))) == 1
        assert lag < 0.25
        for i in range(10):
            await engines._runtime.release(i)

    runner.run(scenario())


async def _worst_lag(ticks: int) -> float:
    worst = 0.0
    for _ in range(ticks):
        asked = time.perf_counter()
        await asyncio.sleep(0.005)
        worst = max(worst, time.perf_counter() - asked - 0.005)
    return worst


def test_a_model_that_cannot_be_loaded_says_why(
    engines: Engines, card: ModelCard, runner: asyncio.Runner, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = engines.training(replace(card, name="broken", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"base model .* cannot be read") as refusal:
        runner.run(engine.start())
    assert "\n" not in refusal.value.message or "Traceback" not in refusal.value.message
    runner.run(engine.stop())


def test_a_worker_that_dies_while_loading_leaves_its_last_words(
    training: ClusterTrainingEngine, runner: asyncio.Runner
) -> None:
    training.actor_class = actors.DyingTrainingActor
    with pytest.raises(ServerError, match=r"died while loading tiny.*Allocation of 1 PB failed"):
        runner.run(training.start())


def test_a_worker_that_is_killed_is_replaced_by_the_one_that_stands_by(
    training: ClusterTrainingEngine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: and the next one stands by; an engine that is stopped leaves neither."""
    training.actor_class = actors.FaultyTrainingActor
    training.standby = True
    monkeypatch.setattr(standby, "DELAY_SECONDS", 0.0)

    async def spare() -> int:
        async with asyncio.timeout(60):
            while training.standby_pid is None:  # noqa: ASYNC110 - another process is waited for
                await asyncio.sleep(0.01)
        return training.standby_pid

    async def body() -> None:
        await training.start()
        for _ in range(2):
            waiting, working = await spare(), training.pid
            assert working is not None
            os.kill(working, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await training.step([create()])
            await training.start()
            assert training.pid == waiting
            (made,) = await training.step([create()])
            assert not made.category
        last = [psutil.Process(await spare()), psutil.Process(training.pid)]
        await training.stop()
        assert not [process for process in last if _runs(process)]

    runner.run(body())


def test_a_hung_step_ends_with_the_engine(training: ClusterTrainingEngine, runner: asyncio.Runner) -> None:
    """F10: stopping a worker that hangs takes its process away and tells whoever waits."""
    training.actor_class = actors.FaultyTrainingActor

    async def scenario() -> None:
        await training.start()
        good((await training.step([create()]))[0])
        process = psutil.Process(training.pid)
        hanging = asyncio.create_task(training.step([forward_backward(actors.HANG)]))
        await asyncio.sleep(0)
        await training.stop()
        with pytest.raises(EngineDied):
            await hanging
        assert not _runs(process)

        await training.start()
        await training.step([create()])
        with pytest.raises(EngineDied):
            await training.step([forward_backward(actors.KILL)])

    runner.run(scenario())


def test_a_broken_sampler_ends_its_process(sampling: ClusterSamplingEngine, runner: asyncio.Runner) -> None:
    """F9: the failed request hears of it, and the process does not live on as a corpse."""
    sampling.actor_class = actors.FaultySamplingActor

    async def scenario() -> None:
        await sampling.start()
        process = psutil.Process(sampling.pid)
        outcome = await sampling.sample("r", None, sample_body(actors.BREAK))
        assert outcome.category == "server"
        await asyncio.to_thread(process.wait, 5)
        with pytest.raises(EngineDied):
            await sampling.sample("s", None, sample_body(1))

    runner.run(scenario())


def test_a_sampler_that_hangs_ends_its_process_and_says_where(
    sampling: ClusterSamplingEngine, runner: asyncio.Runner
) -> None:
    """F10: whoever waits hears of a death, which a new worker mends."""
    sampling.actor_class = actors.FaultySamplingActor

    async def scenario() -> None:
        await sampling.start()
        actor = sampling._actor
        assert actor is not None
        with pytest.raises(EngineDied):
            await sampling.sample("r", None, sample_body(actors.HANG))
        said = "".join(log_tail(actor.session.logs, actor.pid, 200))
        assert "Timeout" in said
        assert "fake_engine.py" in said
        await sampling.start()
        good(await sampling.sample("s", None, sample_body(1)))

    runner.run(scenario())


@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_the_death_of_ray_itself_is_noticed_and_survived(
    victim: str, training: ClusterTrainingEngine, runner: asyncio.Runner
) -> None:
    """Ray would end this whole process a minute after its GCS; it goes on, with a new Ray."""
    training.actor_class = actors.FaultyTrainingActor

    async def scenario() -> None:
        await training.start()
        await training.step([create()])
        hanging = asyncio.create_task(training.step([forward_backward(actors.HANG)]))
        await asyncio.sleep(0)
        next(p for p in psutil.Process().children() if p.name() == victim).kill()
        with pytest.raises(EngineDied):
            await asyncio.wait_for(hanging, 5)
        await training.start()
        good((await training.step([create()]))[0])

    runner.run(scenario())


def test_a_named_cluster_that_is_not_there_is_an_error_within_seconds(
    settings: Settings, card: ModelCard
) -> None:
    """S3-24, fact 6: Ray itself would wait for minutes."""
    engine = Engines(replace(settings, ray_address="127.0.0.1:1")).training(card)
    began = time.perf_counter()
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1.*cannot be reached"):
        asyncio.run(engine.start())
    assert time.perf_counter() - began < 5
