"""What the engines of a base model ask of a cluster, from the settings: GPUs, CPUs, environment, and places together.

Asks nobody and reserves nothing. A model's own numbers go before those of the section ``placement``; without either, a
cluster with two GPUs or more gives training and sampling one each if they are free, and on a single GPU they share it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuft_jupyter.config import PlacementConfig, Settings
from tuft_jupyter.config.placement import sampling_gpus
from tuft_jupyter.engine.placement import Shared
from tuft_jupyter.engine.plan import INFERENCE_ONLY, TRAIN_ONLY, Ask
from tuft_jupyter.engine.ray_runtime import RayThread
from tuft_jupyter.engine.supervision import Demand

UNASKED_SHARE = 0.6
"""Of each GPU, where nobody asked for whole ones: more than half, so that no two meet on one."""


@dataclass(frozen=True, slots=True)
class ModelDemands:
    """Of one base model: what is reserved for it (None: nothing), and the demand of each of its processes."""

    ask: Ask
    shared: Shared | None
    training: tuple[Demand, ...]
    sampling: tuple[Demand, ...]


def ask_of(settings: Settings, name: str) -> Ask:
    """Sizes of a model's placement. ``ranks`` or ``replicas`` is 0 where it is to use no GPU."""
    section, model = settings.placement or PlacementConfig(), settings.model(name)
    own = model.data_parallel > 1 or model.training_gpus is not None or model.training_nodes is not None
    ranks, nodes = model.data_parallel, model.training_nodes or 1
    if settings.placement is not None and not own:
        ranks, nodes = (
            section.training_num_nodes * section.training_num_gpus_per_node,
            section.training_num_nodes,
        )
    per_rank = 1 if model.training_gpus is None else model.training_gpus // ranks
    gpus = sampling_gpus(settings.placement, model)
    return Ask(
        mode=section.mode,
        strategy=section.strategy,
        ranks=ranks if per_rank else 0,
        training_nodes=nodes,
        gpus_per_rank=per_rank,
        replicas=model.sampling_replicas if gpus else 0,
        nodes_per_replica=section.nnodes,
        gpus_per_engine=section.gpus_per_engine(gpus, model.sampling_replicas),
        cpus=model.actor_cpus or 0.0,
        share=1.0 if is_asked(settings, name) else UNASKED_SHARE,
    )


def ranks_of(settings: Settings, name: str) -> int:
    """How many processes train a model."""
    ask, model = ask_of(settings, name), settings.model(name)
    return ask.ranks or model.data_parallel


def is_asked(settings: Settings, name: str) -> bool:
    """Whether somebody said how many GPUs a model gets."""
    model = settings.model(name)
    return settings.placement is not None or (model.training_gpus, model.sampling_gpus) != (None, None)


def demands_of(settings: Settings, name: str, thread: RayThread) -> ModelDemands:
    ask, model = ask_of(settings, name), settings.model(name)
    section, asked = settings.placement or PlacementConfig(), is_asked(settings, name)
    shared = None
    if ask.ranks or ask.replicas:
        seconds = section.wait_seconds if asked else 0.0
        shared = Shared(name, ask, thread, wait_seconds=seconds, required=asked)

    def demand(number: int, gpus: int, refusal: str) -> Demand:
        return Demand(
            shared=shared if gpus and not refusal else None,
            number=number,
            gpus=bool(gpus),
            cpus=model.actor_cpus,
            environment=model.actor_env,
            trusted=settings.trusts_code(name),
            refusal=refusal,
        )

    no_training = _disabled("training", ask.mode) if ask.mode == INFERENCE_ONLY else ""
    no_sampling = _disabled("sampling", ask.mode) if ask.mode == TRAIN_ONLY else ""
    if ask.nodes_per_replica > 1 and not no_sampling:
        no_sampling = (
            f"{name} cannot be sampled from: a replica over {ask.nodes_per_replica} nodes (placement.nnodes) is not "
            "built yet, only planned. Set nnodes to 1 and as many inference_num_gpus as one node has"
        )
    return ModelDemands(
        ask,
        shared,
        tuple(demand(rank, ask.ranks, no_training) for rank in range(ranks_of(settings, name))),
        tuple(
            demand(replica * ask.nodes_per_replica, ask.replicas, no_sampling)
            for replica in range(model.sampling_replicas)
        ),
    )


def _disabled(what: str, mode: str) -> str:
    return f"the capability {what} is disabled on this server: placement.mode is {mode}"
