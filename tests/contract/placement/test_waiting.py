"""GPUs that are not there yet are waited for, as long as was asked and no longer."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.placing import World
from tuft_jupyter.core.errors import ServerError, Unobtainable
from tuft_jupyter.engine.placement import cluster_nodes
from tuft_jupyter.engine.plan import SAMPLING, TRAINING, Ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_too_much_is_refused_in_time_and_leaves_nothing_reserved(world: World) -> None:
    """S3-10, S3-34: the message says how many of how many are there."""
    told: list[str] = []

    async def scenario() -> None:
        problem = (
            r"Timed out waiting for GPUs: 8/12 after 0\.3s\. "
            r"Check that all Ray worker nodes have joined the cluster\."
        )
        with pytest.raises(Unobtainable, match=problem):
            await world.place(Ask(ranks=8, replicas=4), wait_seconds=0.3, on_progress=told.append)
        with pytest.raises(ServerError, match=r"6 GPUs .* do not fit what is free"):
            await world.place(Ask(ranks=5, strategy="STRICT_PACK"), wait_seconds=0)
        await world.until_free()

    world.runner.run(scenario())
    assert told[0] == "waiting for GPUs: 8/12 GPUs"


def test_a_wait_that_is_cancelled_leaves_nothing(world: World) -> None:
    """S3-34."""

    async def scenario() -> None:
        told = asyncio.Event()
        waiting = asyncio.create_task(world.place(Ask(ranks=9), on_progress=lambda _: told.set()))
        await asyncio.wait_for(told.wait(), 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await world.until_free()

    world.runner.run(scenario())


def test_nodes_that_join_end_the_wait_and_all_is_laid_out_as_drawn(world: World) -> None:
    """S2-03, S3-34, S3-53: four GPUs that train, and a replica over the two nodes with eight, which join late.

    The last test of the package, for it leaves two more nodes.
    """
    told: list[str] = []
    ask = Ask(ranks=4, nodes_per_replica=2, gpus_per_engine=8)

    async def scenario() -> None:
        waiting = asyncio.create_task(world.place(ask, on_progress=told.append))
        await world.until(lambda: bool(told))
        for _ in range(2):
            await asyncio.to_thread(world.cluster.add, 8)
        made = await asyncio.wait_for(waiting, 120)
        assert told[0] == "waiting for GPUs: 8/20 GPUs"
        sizes = {node.id: node.gpus_in_all for node in cluster_nodes()}
        train, sample = made.plan.of(TRAINING), made.plan.of(SAMPLING)
        assert {sizes[seat.node] for seat in train} == {4}
        assert len({seat.node for seat in train}) == 1
        assert [sizes[seat.node] for seat in sample] == [8, 8]
        assert [(seat.replica, seat.node_rank, seat.head) for seat in sample] == [(0, 0, True), (0, 1, False)]
        assert sample[0].node < sample[1].node  # on one machine their addresses are the same
        assert len({(seat.node, gpu) for seat in made.plan.seats for gpu in seat.ids}) == 20
        await made.remove()
        await world.until_free(24)

    world.runner.run(scenario())
