"""Training and sampling engines as Ray actors, reached from the event loop.

The driver's side: it creates an actor per engine, moves bytes, and says at once when an actor is gone. Bringing a dead
one up again, and what is then to be replayed, is the caller's business. Ray is imported with the first start, torch
never.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from tuft_jupyter.config import Settings, sampler_choice
from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.errors import ServerError, failure
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.actors import (
    CPU_MALLOC,
    SECRETS,
    ActorOptions,
    EngineActor,
    Loaded,
    Place,
    SamplingActor,
    TrainingActor,
    VllmOptions,
)
from tuft_jupyter.engine.group import TrainingGroup
from tuft_jupyter.engine.pretrained import TRUST
from tuft_jupyter.engine.ray_local import cpus as cpus
from tuft_jupyter.engine.ray_local import log_tail as log_tail
from tuft_jupyter.engine.ray_runtime import Runtime, Session
from tuft_jupyter.tracing import carried

if TYPE_CHECKING:
    from tuft_jupyter.engine.text_worker import Part

log = logging.getLogger(__name__)

GPU_SHARE = 0.2
"""Of one GPU, asked for by every actor: enough for a trainer and a sampler of two base models on one GPU."""
RANK_GPU_SHARE = 0.6
"""Of each GPU of a data-parallel trainer: more than half, so that every process gets one of its own."""
PLACEMENT_SECONDS = 60.0
SAMPLES_AT_ONCE = 4096
END_SECONDS = 10.0


@dataclass(eq=False)
class _Actor:
    """A live actor. ``gone`` is done, with the reason, once it cannot answer any more."""

    handle: Any
    session: Session
    gone: asyncio.Future[str]
    pid: int = 0
    loaded: Loaded | None = None
    gpu_bytes: int = 0


class _ClusterEngine:
    """What training and sampling engines share: one actor's life."""

    kind = ""
    actor_class: type[EngineActor]
    concurrency: int | None = None

    def __init__(
        self,
        card: ModelCard,
        runtime: Runtime,
        threads: int,
        options: Mapping[str, Any] | None = None,
        *,
        trusted: bool = False,
        place: Place | None = None,
    ) -> None:
        self.card = card
        self.threads = threads
        self.trusted = trusted
        self.say: Callable[[str], None] = lambda _: None
        self._runtime = runtime
        self._options = ActorOptions(card, threads, options or {}, place=place)
        self._actor: _Actor | None = None
        self._process: psutil.Process | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.card.name}"

    @property
    def pid(self) -> int | None:
        """The actor's process, None while there is none (or it is on another machine)."""
        actor = self._actor
        return actor.pid if actor and actor.session.place.local and not actor.gone.done() else None

    async def start(self) -> None:
        """Bring up a (new) actor with the model loaded; TuftError says why it cannot be."""
        await self.end()
        self.say("starting a worker" if self._runtime.running else "starting Ray, then a worker")
        session = await self._runtime.acquire(self)
        loop = asyncio.get_running_loop()
        handle = await self._runtime.thread.run(lambda: self._create(session))
        actor = self._actor = _Actor(handle, session, loop.create_future())

        def lost(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_say, actor.gone, reason)

        session.watchers.add(lost)
        actor.gone.add_done_callback(lambda _: session.watchers.discard(lost))
        try:
            await self._load(actor)
        except EngineDied as death:
            await self.end()
            raise ServerError(
                f"the {self.kind} worker died while loading {self.card.name}: {death}"
            ) from None
        except BaseException:
            await self.end()
            raise

    async def stop(self) -> None:
        """End the actor; Ray goes with the last engine."""
        await self.end()
        await self._runtime.release(self)

    def resources(self) -> dict[str, Any]:
        """The actor's process as the lab shows it; empty while there is none. Reads ``/proc``: a millisecond."""
        actor = self._actor
        if actor is None or actor.loaded is None or actor.gone.done():
            return {}
        shown = {
            "name": self.name,
            "pid": actor.pid,
            "device": actor.loaded.device,
            "threads": self.threads,
            "load_seconds": round(actor.loaded.seconds, 3),
            "gpu_bytes": actor.gpu_bytes,
        }
        with contextlib.suppress(psutil.Error):
            if self._process is not None:
                shown |= {"rss_bytes": self._process.memory_info().rss, "cpu": self._process.cpu_percent()}
        return shown

    def _create(self, session: Session) -> Any:
        import ray

        if self._options.place is not None and not session.place.local:
            raise ServerError("data_parallel needs all processes on one machine: leave ray_address out")
        on_gpu = session.gpus > 0
        environment = dict.fromkeys(SECRETS, "") | {"OMP_NUM_THREADS": str(self.threads)}
        environment[TRUST] = "1" if self.trusted else "0"
        if not on_gpu:
            environment |= CPU_MALLOC
        options: dict[str, Any] = {
            "num_cpus": 0 if session.place.local else self.threads,
            "num_gpus": self.gpus() if on_gpu else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment},
        }
        if self.concurrency is not None:
            options["max_concurrency"] = self.concurrency
        return ray.remote(self.actor_class).options(**options).remote(self.actor_options(on_gpu))

    def gpus(self) -> float:
        """How much of the GPUs an actor asks for, where there are any."""
        return GPU_SHARE

    def actor_options(self, on_gpu: bool) -> ActorOptions:
        """What the actor is told."""
        return self._options

    async def _load(self, actor: _Actor) -> None:
        placed = asyncio.ensure_future(self._answer(actor, actor.handle.pid.remote()))
        try:
            actor.pid = await asyncio.wait_for(placed, PLACEMENT_SECONDS)
        except TimeoutError:
            raise ServerError(
                f"Ray found no room for the {self.kind} worker of {self.card.name} within {PLACEMENT_SECONDS:g} s: "
                "stop other work on the cluster or add resources"
            ) from None
        if actor.session.guard is not None:
            with contextlib.suppress(psutil.Error):
                self._process = psutil.Process(actor.pid)
                actor.session.guard.watch(self._process)
        self.say("reading the weights")
        loaded: Loaded = await self._answer(actor, actor.handle.load.remote())
        if loaded.category:
            raise failure(loaded.category, loaded.error)
        actor.loaded = loaded

    async def _answer(self, actor: _Actor, reference: Any) -> Any:
        """The value of a call, or EngineDied as soon as the actor is gone."""
        from ray.exceptions import RayActorError

        value: asyncio.Future[Any] = asyncio.wrap_future(reference.future())
        either: list[asyncio.Future[Any]] = [value, actor.gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if value.done():
            try:
                return value.result()
            except RayActorError:
                _say(actor.gone, await asyncio.to_thread(self._obituary, actor))
        value.cancel()
        raise EngineDied(actor.gone.result())

    def _ready(self) -> _Actor:
        if self._actor is None or self._actor.loaded is None:
            raise EngineDied(f"the {self.kind} worker of {self.card.name} is not running")
        return self._actor

    async def end(self) -> None:
        """Kill the actor and wait until its memory is free again."""
        actor, self._actor = self._actor, None
        if actor is None:
            return
        _say(actor.gone, f"the {self.kind} worker of {self.card.name} was stopped")

        def kill() -> None:
            import ray

            if not actor.session.lost:
                with contextlib.suppress(Exception):  # it may be dead already, and Ray with it
                    ray.kill(actor.handle, no_restart=True)
            if self._process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    try:
                        self._process.wait(END_SECONDS)
                    except psutil.TimeoutExpired:
                        self._process.kill()
            self._process = None

        await self._runtime.thread.run(kill)

    def _obituary(self, actor: _Actor) -> str:
        """Why an actor is gone, in one line, with the last line it wrote if there is one."""
        said = f"the {self.kind} worker (process {actor.pid or 'not started'}) is gone"
        lines = log_tail(actor.session.logs, actor.pid)
        return f"{said}; its last words: {lines[-1].strip()[:300]}" if lines else said


class ClusterTrainingEngine(_ClusterEngine):
    """Implements ``core.engine.TrainingEngine``."""

    kind = "training"
    actor_class = TrainingActor

    @property
    def name(self) -> str:
        place = self._options.place
        return super().name if place is None else f"{super().name} {place.rank + 1}/{place.ranks}"

    def gpus(self) -> float:
        return GPU_SHARE if self._options.place is None else RANK_GPU_SHARE

    @property
    def grain(self) -> int:
        return self._actor.loaded.grain if self._actor and self._actor.loaded else 0

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run one batch; one outcome per task, in order. EngineDied if the worker went away."""
        actor = self._ready()
        outcomes: list[Outcome]
        outcomes, actor.gpu_bytes = await self._answer(
            actor, actor.handle.step.remote(list(tasks), carried.get())
        )
        return outcomes


class ClusterSamplingEngine(_ClusterEngine):
    """Implements ``core.engine.SamplingEngine``."""

    kind = "sampling"
    actor_class = SamplingActor
    concurrency = SAMPLES_AT_ONCE

    def __init__(
        self, *args: Any, asked: str = "torch", vllm: VllmOptions | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._asked, self._vllm = asked, vllm

    def gpus(self) -> float:
        """vLLM spreads a model over whole GPUs; on one it shares."""
        vllm = self.actor_options(on_gpu=True).vllm
        return vllm.tensor_parallel if vllm is not None and vllm.tensor_parallel > 1 else GPU_SHARE

    def actor_options(self, on_gpu: bool) -> ActorOptions:
        """With vLLM's part of it if that is the sampler."""
        installed = importlib.util.find_spec("vllm") is not None
        choice, why = sampler_choice(self._asked, installed=installed, gpu=on_gpu)
        log.info("%s is sampled with %s: %s", self.card.name, choice, why)
        return replace(self._options, vllm=self._vllm if choice == "vllm" else None)

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        """Sample from the base model or from the adapter in a directory; the body is the JSON request."""
        actor = self._ready()
        outcome: Outcome
        outcome, actor.gpu_bytes = await self._answer(
            actor, actor.handle.sample.remote(request_id, adapter, body, tenant, carried.get())
        )
        return outcome

    async def complete(
        self, request_id: str, adapter: str | None, body: bytes, *, chat: bool, tenant: str = "", input_tokens: int = 0
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """The answer to a request in OpenAI's form: its chunks as they are drawn, or the whole as one."""
        actor = self._ready()
        ended = False
        try:
            call = actor.handle.complete.remote(
                request_id, adapter, body, chat, tenant, input_tokens, carried.get()
            )
            while not ended:
                part: Part = await self._answer(actor, call)
                ended = part.ended
                for chunk in part.chunks:
                    yield chunk
                if part.category:
                    raise failure(part.category, part.error)
                if not ended:
                    call = actor.handle.more.remote(request_id)
        finally:
            if not ended:  # nobody listens any more
                actor.handle.cancel.remote(request_id)

    async def cancel(self, request_id: str) -> None:
        await self._answer(self._ready(), self._ready().handle.cancel.remote(request_id))

    async def waits_for(self, request_id: str) -> str:
        return str(await self._answer(self._ready(), self._ready().handle.waits_for.remote(request_id)))


class Engines:
    """Makes the engines of one server; a process has one Ray and so should have one of these."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._runtime = Runtime(settings.home, settings.ray_address)
        self._made: list[_ClusterEngine] = []

    def training(self, card: ModelCard) -> ClusterTrainingEngine | TrainingGroup:
        settings = self.settings
        ranks = settings.model(card.name).data_parallel
        threads = max(1, (settings.trainer_threads or cpus() - 1) // ranks)
        options = {
            "max_rank": settings.rank_limit(card.name),
            "max_length": card.max_context_length,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "custom_loss": settings.custom_loss_server_side,
            "spill": settings.home,
        }
        trusted = settings.trusts_code(card.name)
        meeting = settings.home / f"ranks-{uuid.uuid4().hex}"
        places = [Place(rank, ranks, meeting) for rank in range(ranks)] if ranks > 1 else [None]
        made = [
            ClusterTrainingEngine(card, self._runtime, threads, options, trusted=trusted, place=place)
            for place in places
        ]
        self._made += made
        return made[0] if ranks == 1 else TrainingGroup(made, meeting)

    def sampling(self, card: ModelCard) -> ClusterSamplingEngine:
        options = {"max_context": card.max_context_length, "kv_tokens": self.settings.kv_tokens}
        trusted = self.settings.trusts_code(card.name)
        model = self.settings.model(card.name)
        vllm = VllmOptions(
            max_rank=model.max_lora_rank,
            max_loras=model.max_loras,
            gpu_memory=model.gpu_memory_utilization,
            tensor_parallel=model.tensor_parallel_size,
        )
        asked = model.sampler_type or self.settings.sampler_type
        made = ClusterSamplingEngine(card, self._runtime, 1, options, trusted=trusted, asked=asked, vllm=vllm)
        self._made.append(made)
        return made

    def workers(self) -> list[tuple[str, int]]:
        """(name, pid) of the worker processes on this machine."""
        return [(engine.name, engine.pid) for engine in self._made if engine.pid is not None]


def engines(settings: Settings) -> Engines:
    """The engines of one server; a process has one Ray and so should have one of these."""
    return Engines(settings)


def _say(gone: asyncio.Future[str], reason: str) -> None:
    if not gone.done():
        gone.set_result(reason)
