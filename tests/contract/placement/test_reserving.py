"""What is reserved on a cluster of several nodes, and what is left of it when something goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import actors
from tests.support.placing import GPUS, World
from tests.support.ray_cluster import ROOT
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import placement, ray_place
from tuft_jupyter.engine.placement import cluster_nodes
from tuft_jupyter.engine.plan import TRAINING, Ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_nodes_that_join_are_seen_without_a_restart(world: World) -> None:
    """S2-02, S2-03, S2-05, S2-06: four GPUs on the head, four more and a node with CPUs only, which joined late."""
    import ray

    assert ray.cluster_resources()["GPU"] == GPUS
    made, _ = world.engines()
    shown = world.runner.run(made.ray())
    assert sorted(node["gpus"] for node in shown["nodes"]) == [0, 4, 4]
    assert shown["address"] == world.cluster.address
    assert {node["free_gpus"] for node in shown["nodes"]} == {0, 4}


def test_the_same_gpus_are_reserved_each_time_and_no_probe_stays(world: World) -> None:
    """S3-04, S3-11, S3-12, S3-17, S3-19, S3-20, X8: training and sampling share none, ranks are in the GPUs' order."""
    from ray._private.state import actors as all_actors

    async def scenario() -> None:
        seen = []
        for _ in range(2):
            made = await world.place(Ask(ranks=2, replicas=1), name="demo")
            shown = made.shown()["processes"]
            seen.append(shown)
            slots = [(one["node"], tuple(one["gpus"])) for one in shown]
            assert len(set(slots)) == 3
            ranks = [slot for one, slot in zip(shown, slots, strict=True) if one["role"] == TRAINING]
            assert ranks == sorted(ranks)
            probes = await world.runtime.thread.run(
                lambda: [one for one in all_actors().values() if one["ActorClassName"] == "InfoActor"]
            )
            assert len(probes) >= 3
            await world.until(
                lambda: all(
                    one["State"] == "DEAD"
                    for one in all_actors().values()
                    if one["ActorClassName"] == "InfoActor"
                )
            )
            assert await made.stands()
            await made.remove()
            await world.until_free()
        assert seen[0] == seen[1]

    world.runner.run(scenario())


def test_a_probe_that_hangs_is_an_error_and_gives_the_gpus_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-10, S3-17."""
    monkeypatch.setattr(placement, "InfoActor", actors.HangingActor)
    monkeypatch.setattr(placement, "PROBE_SECONDS", 0.5)

    async def scenario() -> None:
        with pytest.raises(ServerError, match=r"a probe did not answer within 0\.5 s"):
            await world.place(Ask())
        await world.until_free()

    world.runner.run(scenario())


def test_a_cluster_that_stops_answering_leaves_nothing_reserved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-10: what Ray had begun to reserve when it failed is given back, too."""
    from ray.util.placement_group import PlacementGroup

    def fails(group: PlacementGroup, seconds: float) -> bool:
        raise ConnectionError("gone")

    monkeypatch.setattr(PlacementGroup, "wait", fails)

    async def scenario() -> None:
        for _ in range(10):  # Ray itself loses one in twenty groups that are removed while it creates them
            with pytest.raises(ServerError, match="does not answer: ConnectionError: gone"):
                await world.place(Ask(ranks=2))
            await world.until_free()

    world.runner.run(scenario())


def test_local_is_a_fresh_ray_beside_a_cluster(world: World, tmp_path: Path) -> None:
    """S3-28: of its own, below the user's own temporary directory."""
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from tuft_jupyter.engine.placement import cluster_nodes\n"
        "from tuft_jupyter.engine.ray_runtime import Runtime\n"
        "async def main():\n"
        "    runtime = Runtime(Path(sys.argv[1]), None)\n"
        "    session = await runtime.acquire(0)\n"
        "    print('nodes', len(await runtime.thread.run(cluster_nodes)), session.logs, flush=True)\n"
        "    await runtime.release(0)\n"
        "asyncio.run(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"nodes 1 {ray_place.temp_dir()}/session_" in done.stdout, done.stderr[-2000:]
    assert world.runner.run(world.runtime.thread.run(lambda: len(cluster_nodes()))) == 3
