"""Without several GPUs nothing is reserved, and what cannot be had is not waited for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.support import actors
from tuft_jupyter.config import ModelSettings, Settings
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.ray_engines import RayEngines, RayTrainingEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_gpus_that_this_machine_lacks_are_an_error_at_once(
    settings: Settings, engines: RayEngines, card: ModelCard, runner: asyncio.Runner
) -> None:
    """S2-13, S3-25: no node joins a Ray of our own, so nobody waits; what is asked for is not silently left out."""
    served = ModelSettings(card.name, card.path, training_gpus=64)
    demanding = RayEngines(replace(settings, supported_models=(served,)))
    demanding._runtime = engines._runtime
    training = demanding.training(card)
    with pytest.raises(ServerError, match=r"65 GPUs are asked for, and this machine has"):
        runner.run(training.start())
    runner.run(training.stop())


def test_a_laptop_reserves_nothing(training: RayTrainingEngine, runner: asyncio.Runner) -> None:
    """S3-25: without settings, and with one GPU or none, there is no placement group."""
    from ray.util import placement_group_table

    training.actor_class = actors.FaultyTrainingActor
    runner.run(training.start())
    assert training.demand.shared is not None
    assert training.demand.shared.placement is None
    assert {one["state"] for one in placement_group_table().values()} <= {"REMOVED"}
