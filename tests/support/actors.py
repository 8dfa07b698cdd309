"""Actors with a fake in place of the model, for what a real one does not do on demand."""

from __future__ import annotations

import os
import sys
import threading

from tests.support.fake_engine import FakeSampler, FakeTrainer, Faults
from tuft_jupyter.core.engine import Sampler, Trainer
from tuft_jupyter.engine import sampling_worker
from tuft_jupyter.engine.ray_actors import SamplingActor, TrainingActor

HANG = 7
KILL = 8
BREAK = 9


class FaultyTrainingActor(TrainingActor):
    """Hangs or dies on cue, by token."""

    def prepare(self) -> None:
        pass

    def setup_device(self) -> None:
        pass

    def trainer(self) -> Trainer:
        trainer = FakeTrainer(Faults(hang_on=HANG, kill_on=KILL))
        trainer.faults.die = lambda: os._exit(1)
        return trainer


class DyingTrainingActor(TrainingActor):
    """Dies while loading, as for want of memory."""

    def setup_device(self) -> None:
        print("Allocation of 1 PB failed", file=sys.stderr, flush=True)
        os._exit(1)


class FaultySamplingActor(SamplingActor):
    """Its sampler breaks or hangs on cue, by token."""

    def setup_device(self) -> None:
        sampling_worker.HUNG_SECONDS = 0.5

    def sampler(self) -> Sampler:
        return FakeSampler(Faults(raise_on=BREAK, hang_on=HANG))


class SeatedTrainingActor(FaultyTrainingActor):
    """Says where it is."""

    def where(self) -> dict[str, str]:
        return whereabouts()


class SeatedSamplingActor(FaultySamplingActor):
    """Says where it is."""

    def where(self) -> dict[str, str]:
        return whereabouts()


class HangingActor:
    """A probe that never answers."""

    def look(self) -> None:
        threading.Event().wait()


def whereabouts() -> dict[str, str]:
    """The environment of this process, with its node's id and the GPUs that Ray gave it."""
    import ray

    context = ray.get_runtime_context()
    return {**os.environ, "node": context.get_node_id(), "gpus": ",".join(map(str, ray.get_gpu_ids()))}
