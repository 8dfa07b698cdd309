"""Training and sampling engines as Ray actors, and the one Ray they share.

What is asked of an actor, and what it is told when it is made; its life is :mod:`~tuft_jupyter.engine.supervision`'s.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from tuft_jupyter.config import PlacementConfig, Settings, sampler_choice
from tuft_jupyter.core.engine import EngineDied, Outcome, Part, RunMemory, Task, TextTask
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.actor import Actor
from tuft_jupyter.engine.demands import ModelDemands, demands_of
from tuft_jupyter.engine.group import Meeting, TrainingGroup
from tuft_jupyter.engine.placement import nodes_of
from tuft_jupyter.engine.ray_actors import (
    ActorOptions,
    RankOptions,
    SamplingActor,
    TrainingActor,
    VllmOptions,
)
from tuft_jupyter.engine.ray_local import cpus
from tuft_jupyter.engine.ray_runtime import Runtime
from tuft_jupyter.engine.replicas import SamplingReplicas
from tuft_jupyter.engine.supervision import GPU_SHARE, Demand, RayEngine
from tuft_jupyter.tracing import current_traceparent

log = logging.getLogger(__name__)

RANK_GPU_SHARE = 0.6
"""Of each GPU of a data-parallel trainer: more than half, so that every process gets one of its own."""
SAMPLES_AT_ONCE = 4096


class RayTrainingEngine(RayEngine):
    """Implements ``core.engine.TrainingEngine``."""

    kind = "training"
    actor_class = TrainingActor

    def __init__(
        self,
        runtime: Runtime,
        options: ActorOptions,
        demand: Demand,
        *,
        standby: bool = False,
        meeting: Meeting | None = None,
        sampler: str = "torch",
    ) -> None:
        """``sampler``: the one that is to sample what is trained."""
        super().__init__(runtime, options, demand, standby=standby)
        self._meeting = meeting
        self._sampler = sampler

    def actor_options(self, on_gpu: bool) -> ActorOptions:
        """What cannot be sampled later is not trained."""
        experts = _chosen(self._sampler, on_gpu)[0] != "vllm"
        return replace(self._options, options={**self._options.options, "experts": experts})

    async def meeting(self, actor: Actor) -> str:
        """A file where all ranks are on one machine, else an address on the first rank's node."""
        this = self._options.rank
        if this is None or self._meeting is None:
            return ""
        if actor.session.place.local:
            return await self._meeting.on_one_machine()
        return await self._meeting.among_nodes(
            this.rank, lambda: self._answer(actor, actor.handle.address.remote())
        )

    @property
    def name(self) -> str:
        this = self._options.rank
        return super().name if this is None else f"{super().name} {this.rank + 1}/{this.ranks}"

    @property
    def leads(self) -> bool:
        """Whether it is the only process of its trainer, or the first one."""
        return self._options.rank is None or self._options.rank.rank == 0

    def gpus(self) -> float:
        return GPU_SHARE if self._options.rank is None else RANK_GPU_SHARE

    @property
    def part_tokens(self) -> int:
        return self._actor.loaded.part_tokens if self._actor and self._actor.loaded else 0

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run one batch; one outcome per task, in order. EngineDied if the worker went away."""
        actor = self._ready()
        outcomes: list[Outcome]
        outcomes, actor.gpu_bytes = await self._answer(
            actor, actor.handle.step.remote(list(tasks), current_traceparent.get())
        )
        return outcomes

    async def memory(self) -> dict[str, RunMemory]:
        """What each run takes in memory, once the step under way is done; nothing while there is no worker."""
        try:
            actor = self._ready()
            found: dict[str, RunMemory] = await self._answer(actor, actor.handle.memory.remote())
        except EngineDied:
            return {}
        return found


class RaySamplingEngine(RayEngine):
    """Implements ``core.engine.SamplingEngine``."""

    kind = "sampling"
    actor_class = SamplingActor
    concurrency = SAMPLES_AT_ONCE

    def __init__(
        self, runtime: Runtime, options: ActorOptions, demand: Demand, *, asked: str = "torch"
    ) -> None:
        """``asked``: the sampler that is to be used; ``options`` have vLLM's part in any case."""
        super().__init__(runtime, options, demand)
        self._asked = asked

    def gpus(self) -> float:
        """vLLM spreads a model over whole GPUs; on one it shares."""
        vllm = self.actor_options(on_gpu=True).vllm
        return vllm.tensor_parallel if vllm is not None and vllm.tensor_parallel > 1 else GPU_SHARE

    def actor_options(self, on_gpu: bool) -> ActorOptions:
        """With vLLM's part of them only if that is the sampler."""
        choice, why = _chosen(self._asked, on_gpu)
        log.info("%s is sampled with %s: %s", self.card.name, choice, why)
        return replace(self._options, vllm=self._options.vllm if choice == "vllm" else None)

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        """Sample from the base model or from the adapter in a directory; the body is the JSON request."""
        actor = self._ready()
        outcome: Outcome
        outcome, actor.gpu_bytes = await self._answer(
            actor, actor.handle.sample.remote(request_id, adapter, body, tenant, current_traceparent.get())
        )
        return outcome

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """The answer in parts, as its tokens are drawn. Closing the iterator stops the drawing."""
        actor = self._ready()
        ended = False
        try:
            call = actor.handle.complete.remote(task, current_traceparent.get())
            while not ended:
                part: Part = await self._answer(actor, call)
                ended = part.ended
                yield part
                if not ended:
                    call = actor.handle.more.remote(task.request_id)
        finally:
            if not ended:  # nobody listens any more
                actor.handle.cancel.remote(task.request_id)

    async def cancel(self, request_id: str) -> None:
        await self._answer(self._ready(), self._ready().handle.cancel.remote(request_id))

    async def waits_for(self, request_id: str) -> str:
        return str(await self._answer(self._ready(), self._ready().handle.waits_for.remote(request_id)))


def _chosen(asked: str, on_gpu: bool) -> tuple[str, str]:
    """The sampler, and why it is that one."""
    return sampler_choice(asked, installed=importlib.util.find_spec("vllm") is not None, gpu=on_gpu)


class RayEngines:
    """Makes the engines of one server; a process has one Ray and so should have one of these."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._runtime = Runtime(settings.home, settings.ray_address, settings.ray_namespace)
        self._made: list[RayEngine] = []
        self._demands: dict[str, ModelDemands] = {}

    def training(self, card: ModelCard) -> RayTrainingEngine | TrainingGroup:
        settings = self.settings
        demands = self._demanded(card).training
        ranks = len(demands)
        sampler = "vllm" if settings.backends.on_vllm else settings.sampler_asked(card.name)
        threads = max(1, (settings.trainer_threads or cpus() - 1) // ranks)
        model = settings.model(card.name)
        options = {
            "max_rank": settings.rank_limit(card.name),
            "max_length": model.max_train_len or card.max_context_length,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "custom_loss": settings.custom_loss_server_side,
            "spill": settings.home,
        }
        if ranks == 1:
            alone = RayTrainingEngine(
                self._runtime,
                ActorOptions(card, threads, model.dtype, options),
                demands[0],
                standby=settings.standby_worker,
                sampler=sampler,
            )
            self._made.append(alone)
            return alone
        section = settings.placement or PlacementConfig()
        meeting = Meeting(settings.home / f"ranks-{uuid.uuid4().hex}", section.dist_init_addr)
        made = [
            RayTrainingEngine(
                self._runtime,
                ActorOptions(
                    card, threads, model.dtype, options, rank=RankOptions(rank, ranks, section.dist_timeout)
                ),
                demand,
                meeting=meeting,
                sampler=sampler,
            )
            for rank, demand in enumerate(demands)
        ]
        self._made += made
        return TrainingGroup(made, meeting)

    def sampling(self, card: ModelCard) -> RaySamplingEngine | SamplingReplicas:
        model = self.settings.model(card.name)
        demanded = self._demanded(card)
        vllm = VllmOptions(
            max_rank=model.max_lora_rank,
            max_loras=model.max_loras,
            gpu_memory=model.gpu_memory_utilization,
            tensor_parallel=max(model.tensor_parallel_size, demanded.ask.gpus_per_engine),
            enable_lora=model.enable_lora,
        )
        backends = self.settings.backends
        if backends.sampling == "vllm":
            vllm = replace(
                vllm,
                max_rank=self.settings.rank_limit(card.name),
                max_loras=backends.max_loras,
                gpu_memory=backends.gpu_memory_utilization,
                enable_lora=backends.enable_lora,
            )
        options = ActorOptions(
            card,
            threads=1,
            dtype=model.dtype,
            options={
                "max_context": card.max_context_length,
                "kv_tokens": self.settings.kv_tokens,
                "logprobs_mode": model.logprobs_mode,
            },
            vllm=vllm,
            adapters=model.enable_lora,
            text_workers=self.settings.text_workers,
        )
        asked = self.settings.sampler_asked(card.name)
        made = [
            RaySamplingEngine(self._runtime, options, demand, asked=asked) for demand in demanded.sampling
        ]
        self._made += made
        return made[0] if len(made) == 1 else SamplingReplicas(made)

    def _demanded(self, card: ModelCard) -> ModelDemands:
        """The same for a model's training and its sampling: their places are reserved together."""
        if card.name not in self._demands:
            self._demands[card.name] = demands_of(self.settings, card.name, self._runtime.thread)
        return self._demands[card.name]

    async def ray(self) -> dict[str, Any]:
        """The Ray that is up, its nodes and GPUs, and what is placed where, as JSON. Starts nothing; ServerError if the
        cluster does not answer."""
        session = self._runtime.session
        nodes = [] if session is None else await nodes_of(self._runtime.thread)
        return {
            "address": None if session is None else session.place.address,
            "why": None if session is None else session.place.why,
            "nodes": [
                {"id": node.id, "ip": node.ip, "gpus": node.gpus_in_all, "free_gpus": node.gpus}
                for node in nodes
            ],
            "placements": self.placements(),
        }

    def placements(self) -> list[dict[str, Any]]:
        """What is reserved for each base model, as JSON."""
        shared = [demands.shared for demands in self._demands.values()]
        return [one.placement.shown() for one in shared if one is not None and one.placement is not None]

    async def memory(self) -> dict[str, RunMemory]:
        """What each run in training takes in memory; of a data-parallel trainer, in its first process."""
        trainers = [engine for engine in self._made if isinstance(engine, RayTrainingEngine)]
        found = await asyncio.gather(*(engine.memory() for engine in trainers if engine.leads))
        return {run: taken for of_one in found for run, taken in of_one.items()}

    def workers(self) -> list[tuple[str, int]]:
        """(name, pid) of the worker processes on this machine."""
        working = [(engine.name, engine.pid) for engine in self._made]
        spare = [(f"standby for {engine.name}", engine.standby_pid) for engine in self._made]
        return [(name, pid) for name, pid in [*working, *spare] if pid is not None]
