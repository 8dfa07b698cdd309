"""One Ray for all tests of engines in actors, started from an environment full of secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.actor_tasks import CANARY, runs
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import Settings
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.ray_actors import SECRETS
from tuft_jupyter.engine.ray_engines import RayEngines, RaySamplingEngine, RayTrainingEngine


@pytest.fixture(scope="package")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return models.resolve(str(make_model(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="package")
def settings(ray_home: Path) -> Settings:
    return Settings(
        home=ray_home, checkpoint_dir=ray_home / "checkpoints", trainer_threads=1, standby_worker=False
    )


@pytest.fixture(scope="package")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all: Ray is started once."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="package")
def engines(settings: Settings, runner: asyncio.Runner) -> Iterator[RayEngines]:
    """Engines whose Ray stays up between the tests, and is gone without a trace after them."""
    others = {*psutil.Process().children(recursive=True)}  # servers of other tests
    made = RayEngines(settings)
    keeper = object()
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, CANARY)
        runner.run(made._runtime.acquire(keeper))
    processes = {*psutil.Process().children(recursive=True)} - others
    yield made
    runner.run(made._runtime.release(keeper))
    assert not [process for process in processes if runs(process)]


@pytest.fixture
def training(engines: RayEngines, card: ModelCard, runner: asyncio.Runner) -> Iterator[RayTrainingEngine]:
    engine = engines.training(card)
    yield engine
    runner.run(engine.stop())


@pytest.fixture
def sampling(engines: RayEngines, card: ModelCard, runner: asyncio.Runner) -> Iterator[RaySamplingEngine]:
    engine = engines.sampling(card)
    yield engine
    runner.run(engine.stop())
