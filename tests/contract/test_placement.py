"""A cluster of several nodes with declared GPUs: what is reserved, where actors run, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinker.proto.response_conv import deserialize_sample_response

from tests.support import actors
from tests.support.cluster import sample_body
from tests.support.ray_cluster import ROOT, RayCluster
from tests.support.steps import RUN, losses, steps
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import ModelSettings, PlacementConfig, Settings
from tuft_jupyter.core.engine import Task
from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import ModelCard, OpKind
from tuft_jupyter.engine import placement, ray_place
from tuft_jupyter.engine.group import TrainingGroup
from tuft_jupyter.engine.placement import Placement, cluster_nodes, create_placement
from tuft_jupyter.engine.plan import SAMPLING, SEPARATE, TRAINING, Ask
from tuft_jupyter.engine.ray_engines import RayEngines
from tuft_jupyter.engine.ray_runtime import Runtime, Session
from tuft_jupyter.engine.replicas import SamplingReplicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GPUS = 8


class World:
    """The cluster of three nodes, and this process as its driver."""

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

    async def until_free(self, gpus: float = GPUS) -> None:
        await self.until(lambda: sum(node.gpus for node in cluster_nodes()) >= gpus)


@pytest.fixture(scope="module")
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


def where(engine: Any) -> Any:
    return engine._answer(engine._actor, engine._actor.handle.where.remote())


def gpus_of(place: dict[str, str]) -> list[str]:
    """In order: of several, Ray tells each process another one."""
    return sorted(place["gpus"].split(","))


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


def test_too_much_is_refused_in_time_and_leaves_nothing_reserved(world: World) -> None:
    """S3-10, S3-34: the message says how many of how many are there."""
    told: list[str] = []

    async def scenario() -> None:
        problem = (
            r"Timed out waiting for GPUs: 8/12 after 0\.3s\. "
            r"Check that all Ray worker nodes have joined the cluster\."
        )
        with pytest.raises(ServerError, match=problem):
            await world.place(Ask(ranks=8, replicas=4), wait_seconds=0.3, on_progress=told.append)
        with pytest.raises(ServerError, match=r"6 GPUs .* do not fit what is free"):
            await world.place(Ask(ranks=5, strategy="STRICT_PACK"), wait_seconds=0)
        await world.until_free()

    world.runner.run(scenario())
    assert told[0] == "waiting for GPUs: 8/12 GPUs"


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


def test_a_wait_that_is_cancelled_leaves_nothing(world: World) -> None:
    """S3-34."""

    async def scenario() -> None:
        told = asyncio.Event()
        waiting = asyncio.create_task(world.place(Ask(ranks=9), on_progress=lambda _: told.set()))
        await asyncio.wait_for(told.wait(), 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await world.until_free()

    world.runner.run(scenario())


def test_actors_run_where_they_were_placed_with_their_environment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-05, S2-09, S2-13, S2-15, S2-16, S2-34, S2-35, S2-40, S2-49, S3-26, S3-39."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth8")
    monkeypatch.setenv("TP_SOCKET_IFNAME", "eth9")
    made, card = world.engines(
        PlacementConfig(strategy="SPREAD"),
        training_gpus=3,
        sampling_gpus=1,
        actor_cpus=0.1,
        actor_env={"TWINKLE_TRUST_REMOTE_CODE": "0", "OF_THE_MODEL": "yes"},
    )
    training, sampling = made.training(card), made.sampling(card)
    training.actor_class, sampling.actor_class = actors.SeatedTrainingActor, actors.SeatedSamplingActor

    async def scenario() -> None:
        import ray

        await asyncio.gather(training.start(), sampling.start())
        trains, samples = await where(training), await where(sampling)
        assert trains["node"] != samples["node"]
        assert sum(node.gpus for node in cluster_nodes()) == GPUS - 4
        for one in (trains, samples):
            assert one["CUDA_VISIBLE_DEVICES"] == one["gpus"]
            assert (one["NCCL_SOCKET_IFNAME"], one["GLOO_SOCKET_IFNAME"], one["TP_SOCKET_IFNAME"]) == (
                "eth7",
                "eth8",
                "eth9",
            )
            assert (one["OF_THE_MODEL"], one["TWINKLE_TRUST_REMOTE_CODE"]) == ("yes", "0")
        assert len(gpus_of(trains)) == 3
        (shown,) = made.placements()
        assert [(one["role"], one["node"], one["gpus"]) for one in shown["processes"]] == [
            (TRAINING, trains["node"], gpus_of(trains)),
            (SAMPLING, samples["node"], gpus_of(samples)),
        ]
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
        assert {name.rpartition(" ")[0] for name in names} == {"training demo", "sampling demo"}
        used = [node for node in cluster_nodes() if node.id in (trains["node"], samples["node"])]
        assert [round(4 - node.cpus, 1) for node in used] == [0.1, 0.1]
        await training.start()  # a new process in the old place
        assert gpus_of(await where(training)) == gpus_of(trains)
        await training.stop()
        assert made.placements()
        await sampling.stop()
        assert made.placements() == []
        await world.until_free()

    world.runner.run(scenario())


def test_an_actor_that_needs_no_gpu_starts_while_all_are_reserved(world: World) -> None:
    """S2-04, S2-11: with training_gpus 0 it asks for none, and what it sees is none."""
    made, card = world.engines(training_gpus=0, sampling_gpus=0)
    training = made.training(card)
    training.actor_class = actors.SeatedTrainingActor

    async def scenario() -> None:
        everything = await world.place(Ask(ranks=GPUS, replicas=0))
        await training.start()
        assert (await where(training))["gpus"] == ""
        await training.stop()
        await everything.remove()
        await world.until_free()

    world.runner.run(scenario())


def test_in_colocate_both_have_the_same_gpu(world: World) -> None:
    """S3-13."""
    made, card = world.engines(PlacementConfig(mode="colocate"))
    training, sampling = made.training(card), made.sampling(card)
    training.actor_class, sampling.actor_class = actors.SeatedTrainingActor, actors.SeatedSamplingActor

    async def scenario() -> None:
        await asyncio.gather(training.start(), sampling.start())
        trains, samples = await where(training), await where(sampling)
        assert (trains["node"], trains["gpus"]) == (samples["node"], samples["gpus"])
        assert sum(node.gpus for node in cluster_nodes()) == GPUS - 1
        await asyncio.gather(training.stop(), sampling.stop())
        await world.until_free()

    world.runner.run(scenario())


@pytest.mark.parametrize(
    ("mode", "refused"), [("debug_train_only", SAMPLING), ("debug_inference_only", TRAINING)]
)
def test_a_single_mode_reserves_its_own_and_refuses_the_other(world: World, mode: str, refused: str) -> None:
    """S3-14, S3-15."""
    made, card = world.engines(PlacementConfig(mode=mode))
    engines: dict[str, Any] = {TRAINING: made.training(card), SAMPLING: made.sampling(card)}
    engines[TRAINING].actor_class = actors.SeatedTrainingActor
    engines[SAMPLING].actor_class = actors.SeatedSamplingActor

    async def scenario() -> None:
        with pytest.raises(UserError, match=rf"the capability {refused} is disabled.*{mode}"):
            await engines.pop(refused).start()
        (works,) = engines.values()
        await works.start()
        assert sum(node.gpus for node in cluster_nodes()) == GPUS - 1
        await works.stop()
        await world.until_free()

    world.runner.run(scenario())


def test_without_settings_training_and_sampling_have_different_gpus(world: World) -> None:
    """S2-08, S3-20: the default where there are two GPUs or more."""
    made, card = world.engines()
    training, sampling = made.training(card), made.sampling(card)
    training.actor_class, sampling.actor_class = actors.SeatedTrainingActor, actors.SeatedSamplingActor

    async def scenario() -> None:
        await asyncio.gather(training.start(), sampling.start())
        trains, samples = await where(training), await where(sampling)
        assert (trains["node"], trains["gpus"]) != (samples["node"], samples["gpus"])
        (shown,) = made.placements()
        assert shown["mode"] == SEPARATE
        await asyncio.gather(training.stop(), sampling.stop())
        await world.until_free()

    world.runner.run(scenario())


def test_requests_are_shared_among_sampling_replicas(world: World) -> None:
    """S2-10: two engines on a GPU each, and both are sent requests."""
    made, card = world.engines(sampling_gpus=2, sampling_replicas=2, training_gpus=0)
    sampling = made.sampling(card)
    assert isinstance(sampling, SamplingReplicas)
    for replica in sampling.replicas:
        replica.actor_class = actors.SeatedSamplingActor  # type: ignore[attr-defined]

    async def scenario() -> None:
        await sampling.start()
        gpus = {(await where(replica))["gpus"] for replica in sampling.replicas}
        assert len(gpus) == 2
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
        body = json.dumps({"prompt": prompt, "sampling_params": {"max_tokens": 2}}).encode()
        answers = await asyncio.gather(*(sampling.sample(f"r{i}", None, body) for i in range(6)))
        assert [answer.error for answer in answers if answer.category] == []
        assert sampling.sent == [3, 3]
        await sampling.stop()
        await world.until_free()

    world.runner.run(scenario())


def test_a_trainer_on_two_nodes_is_one_trainer(world: World, tmp_path: Path) -> None:
    """S1-67, S2-39, S3-41, S3-42, S3-51: its ranks meet where the first one says; numbers are those of one process."""
    import torch

    from tuft_jupyter.engine.trainer import PeftTrainer
    from tuft_jupyter.engine.worker import TrainingWorker

    card = models.resolve(str(make_model(tmp_path / "tiny")))
    served = ModelSettings(card.name, card.path, data_parallel=2, training_gpus=2, training_nodes=2)
    made = world.engines_of(replace(served, sampling_gpus=0), None)
    group = made.training(card)
    assert isinstance(group, TrainingGroup)
    alone = TrainingWorker(PeftTrainer(card.path, name=card.name, dtype=torch.float32, device="cpu"))
    wanted = losses(alone.step(steps()))

    async def scenario() -> None:
        await group.start()
        (shown,) = made.placements()
        assert len({process["node"] for process in shown["processes"]}) == 2
        assert shown["mesh"]["data_parallel"] == 2
        assert losses(await group.step(steps())) == pytest.approx(wanted, rel=1e-5)
        await group.stop()
        assert made.placements() == []
        await world.until_free()

    world.runner.run(scenario())


def test_weights_trained_on_one_node_are_sampled_from_on_another(world: World, tmp_path: Path) -> None:
    """S3-08: the adapter is handed over as files at a path that both nodes have."""
    card = models.resolve(str(make_model(tmp_path / "tiny")))
    made = world.engines_of(ModelSettings(card.name, card.path), PlacementConfig(strategy="SPREAD"))
    training, sampling = made.training(card), made.sampling(card)
    weights = str(tmp_path / "weights")
    save = Task(
        "save", RUN, OpKind.SAVE_WEIGHTS_FOR_SAMPLER, {"directory": weights, "optimizer": False, "path": "p"}
    )

    async def scenario() -> None:
        await asyncio.gather(training.start(), sampling.start())
        (shown,) = made.placements()
        assert len({process["node"] for process in shown["processes"]}) == 2
        assert [one.error for one in await training.step([*steps(), save]) if one.category] == []
        drawn = []
        for adapter in (None, weights):
            outcome = await sampling.sample(f"of {adapter}", adapter, sample_body(5, 6))
            assert not outcome.category, outcome.error
            drawn.append(deserialize_sample_response(outcome.result).sequences[0].logprobs)
        assert drawn[0] != drawn[1]
        await asyncio.gather(training.stop(), sampling.stop())
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


def test_ranks_that_do_not_meet_in_time_leave_nothing(world: World, tmp_path: Path) -> None:
    """S3-52: a clear error, no actor, and all GPUs free."""
    card = models.resolve(str(make_model(tmp_path / "tiny")))
    served = ModelSettings(card.name, card.path, data_parallel=2, training_gpus=2, sampling_gpus=0)
    nowhere = PlacementConfig(dist_init_addr="192.0.2.77:9", dist_timeout=1)
    group = world.engines_of(served, nowhere).training(card)

    async def scenario() -> None:
        with pytest.raises(ServerError, match=r"did not meet at 192\.0\.2\.77:9 within 1 s"):
            await group.start()
        await world.until_free()
        await group.stop()

    world.runner.run(scenario())


def test_nodes_that_join_end_the_wait_and_all_is_laid_out_as_drawn(world: World) -> None:
    """S2-03, S3-34, S3-53: four GPUs that train, and a replica over the two nodes with eight, which join late.

    The last test here, for it leaves two more nodes.
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
