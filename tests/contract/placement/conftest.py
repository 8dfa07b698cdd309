"""The cluster of three nodes, up for all tests here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.placing import GPUS, World
from tests.support.ray_cluster import RayCluster
from tuft_jupyter.engine import ray_place


@pytest.fixture(scope="package")
def world(ray_home: Path) -> Iterator[World]:
    cluster = RayCluster(ray_place.token_file(ray_home))
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_place.token_file(ray_home)))
        try:
            cluster.add(4, "0,1,2,3")
            cluster.add(4, "4,5,6,7")
            made = World(cluster, ray_home, runner)
            assert made.session.gpus == GPUS
            cluster.add(0)
            yield made
            runner.run(made.runtime.release(made))
        finally:
            cluster.stop()
    assert not cluster.processes()
