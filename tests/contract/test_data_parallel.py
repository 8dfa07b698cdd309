"""A model with ``data_parallel: 2``: two actors train it, and live and die as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.actor_tasks import runs
from tests.support.steps import losses, steps
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import ModelSettings, Settings
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.group import TrainingGroup
from tuft_jupyter.engine.ray_engines import RayEngines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    return models.resolve(str(make_model(tmp_path / "tiny")))


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def engines(card: ModelCard, ray_home: Path) -> RayEngines:
    served = ModelSettings(model_name=card.name, model_path=card.path, max_lora_rank=8, data_parallel=2)
    kept = ray_home / "checkpoints"
    return RayEngines(Settings(home=ray_home, checkpoint_dir=kept, supported_models=(served,)))


@pytest.fixture
def group(engines: RayEngines, card: ModelCard, runner: asyncio.Runner) -> Iterator[TrainingGroup]:
    group = engines.training(card)
    assert isinstance(group, TrainingGroup)
    yield group
    runner.run(group.stop())


def test_two_actors_train_as_one_and_the_death_of_either_is_the_death_of_both(
    group: TrainingGroup, engines: RayEngines, card: ModelCard, runner: asyncio.Runner
) -> None:
    """S2-41: numbers of one process; a killed rank is a dead trainer, which starts again and answers the same."""
    import torch

    from tuft_jupyter.engine.trainer import PeftTrainer
    from tuft_jupyter.engine.worker import TrainingWorker

    alone = TrainingWorker(PeftTrainer(card.path, name=card.name, dtype=torch.float32, device="cpu"))
    wanted = losses(alone.step(steps()))

    async def scenario() -> None:
        await group.start()
        assert losses(await group.step(steps())) == pytest.approx(wanted, rel=1e-5)
        ranks = [psutil.Process(pid) for _, pid in engines.workers()]
        assert len(ranks) == 2
        ranks[1].suspend()  # so that it cannot answer before it dies
        waiting = asyncio.ensure_future(group.step(steps()))
        await asyncio.sleep(0)
        ranks[1].kill()
        with pytest.raises(EngineDied):
            await waiting
        assert not any(map(runs, ranks))
        await group.start()
        assert losses(await group.step(steps())) == pytest.approx(wanted, rel=1e-5)

    runner.run(scenario())
