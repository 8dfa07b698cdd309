"""A cluster of three nodes with declared GPUs, and this process as its driver: what tests of placement share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.ray_cluster import RayCluster
from tuft_jupyter import models
from tuft_jupyter.config import ModelSettings, PlacementConfig, Settings
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.placement import Placement, cluster_nodes, create_placement
from tuft_jupyter.engine.plan import Ask
from tuft_jupyter.engine.ray_engines import RayEngines
from tuft_jupyter.engine.ray_runtime import Runtime, Session

GPUS = 8


class World:
    """The cluster, and this process as its driver."""

    def __init__(self, cluster: RayCluster, home: Path, runner: asyncio.Runner) -> None:
        self.cluster = cluster
        self.home = home
        self.runner = runner
        self.runtime = Runtime(home, cluster.address)
        self.session: Session = runner.run(self.runtime.acquire(self))

    async def place(self, ask: Ask, **options: Any) -> Placement:
        return await create_placement(ask, self.session, self.runtime.thread, **options)

    def engines(self, section: PlacementConfig | None = None, **model: Any) -> tuple[RayEngines, ModelCard]:
        card = replace(models.resolve("tuft/demo"), name="demo")
        return self.engines_of(ModelSettings("demo", card.path, **model), section), card

    def engines_of(self, served: ModelSettings, section: PlacementConfig | None) -> RayEngines:
        settings = Settings(
            home=self.home,
            checkpoint_dir=self.home / "checkpoints",
            ray_address=self.cluster.address,
            supported_models=(served,),
            placement=section,
        )
        made = RayEngines(settings)
        made._runtime = self.runtime  # a process has one Ray
        return made

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not await self.runtime.thread.run(condition):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def until_taken(self, gpus: float) -> None:
        """Of those that there are at first; the cluster hears of it from its nodes."""
        await self.until(lambda: sum(node.gpus for node in cluster_nodes()) == GPUS - gpus)

    async def until_free(self, gpus: float = GPUS) -> None:
        await self.until(lambda: sum(node.gpus for node in cluster_nodes()) >= gpus)


def where(engine: Any) -> Any:
    return engine._answer(engine._actor, engine._actor.handle.where.remote())


def gpus_of(place: dict[str, str]) -> list[str]:
    """In order: of several, Ray tells each process another one."""
    return sorted(place["gpus"].split(","))
