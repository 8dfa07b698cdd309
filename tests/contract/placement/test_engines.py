"""Engines in the places that were reserved for them: where their processes are, and what they see and do there."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tinker.proto.response_conv import deserialize_sample_response

from tests.support import actors
from tests.support.actor_tasks import sample_body
from tests.support.placing import GPUS, World, gpus_of, where
from tests.support.steps import RUN, losses, steps
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import ModelSettings, PlacementConfig
from tuft_jupyter.core.engine import Task
from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import OpKind
from tuft_jupyter.engine.group import TrainingGroup
from tuft_jupyter.engine.placement import cluster_nodes
from tuft_jupyter.engine.plan import SAMPLING, SEPARATE, TRAINING, Ask
from tuft_jupyter.engine.replicas import SamplingReplicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


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
        await world.until_taken(4)
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
        used = (trains["node"], samples["node"])
        await world.until(
            lambda: [round(4 - node.cpus, 1) for node in cluster_nodes() if node.id in used] == [0.1, 0.1]
        )
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
        there = await where(training)
        assert (there["gpus"], there.get("CUDA_VISIBLE_DEVICES")) == ("", "")
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
        await world.until_taken(1)
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
        await world.until_taken(1)
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
