"""What engines in actors answer: the same numbers as in one process, and why a model cannot be loaded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tests.support.actor_tasks import (
    create,
    forward_backward,
    good,
    optim_step,
    sample_body,
    until_dead,
)
from tests.support.loops import at_best
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.ray_engines import RayEngines, RaySamplingEngine, RayTrainingEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_training_through_an_actor_equals_training_in_this_process(
    training: RayTrainingEngine, card: ModelCard, runner: asyncio.Runner
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
        noticed = []
        for _ in range(2):
            there = await training.step(tasks)
            for i, expected in zip((1, 3), wanted, strict=True):
                got = deserialize_forward_backward_output(good(there[i]).result)
                assert got.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
            noticed.append(await until_dead(training, training.step([optim_step()])))
            with pytest.raises(EngineDied):
                await training.step([optim_step()])
            assert training.resources() == {}
            await training.start()
        assert min(noticed) < 1.0
        (missing,) = await training.step([optim_step()])
        assert missing.category == "user"  # the new worker knows nothing of the old one's runs

    runner.run(scenario())


def test_sampling_cancelling_and_dying_through_an_actor(
    sampling: RaySamplingEngine, runner: asyncio.Runner, tmp_path: Path
) -> None:
    """S3-05: on a CPU, too; a death is noticed at once, and the next process draws the same."""

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

        async def noticed() -> float:
            dying = sampling.sample("long", None, sample_body(5, max_tokens=400))
            seconds = await until_dead(sampling, dying)
            await sampling.start()
            return seconds

        assert await at_best(noticed, 1.0) < 1.0
        again = await sampling.sample("r0", None, sample_body(5, 6, 0))
        sampled = [
            deserialize_sample_response(good(o).result).sequences[0].tokens for o in (again, outcomes[0])
        ]
        assert sampled[0] == sampled[1]

    runner.run(scenario())


def test_a_model_that_cannot_be_loaded_says_why(
    engines: RayEngines, card: ModelCard, runner: asyncio.Runner, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = engines.training(replace(card, name="broken", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"base model .* cannot be read") as refusal:
        runner.run(engine.start())
    assert "\n" not in refusal.value.message or "Traceback" not in refusal.value.message
    runner.run(engine.stop())
