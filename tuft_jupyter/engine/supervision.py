"""One actor's life, as the event loop sees it: created, loaded, asked, noticed when it is gone, ended.

Bringing a dead one up again, and what is then to be replayed, is the caller's business. Ray is imported with the first
start, torch never.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import ServerError, UserError, failure
from tuft_jupyter.engine.actor import Actor
from tuft_jupyter.engine.placement import Placement, Shared
from tuft_jupyter.engine.pretrained import TRUST
from tuft_jupyter.engine.ray_actors import (
    CPU_MEMORY,
    NETWORK,
    NO_GPU,
    SECRETS,
    ActorOptions,
    EngineActor,
    Loaded,
)
from tuft_jupyter.engine.ray_local import log_tail
from tuft_jupyter.engine.ray_runtime import Runtime, Session
from tuft_jupyter.engine.standby import Standby

GPU_SHARE = 0.2
"""Of one GPU, asked for by every actor: enough for a trainer and a sampler of two base models on one GPU."""
PLACEMENT_SECONDS = 60.0
END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What an engine's actor asks of Ray and is started with.

    ``shared`` is there if GPUs are reserved for its base model, and ``number`` is then which of that model's processes
    of its kind it is. ``gpus`` False: it uses none. ``cpus`` are asked for on a cluster; None: as many as it has
    threads. ``trusted``: it may run Python code that lies beside the model. ``refusal`` says why there may be no such
    actor.
    """

    shared: Shared | None = None
    number: int = 0
    gpus: bool = True
    cpus: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    trusted: bool = False
    refusal: str = ""


class RayEngine:
    """What training and sampling engines share. ``standby``: whether a spare process is kept for the next start."""

    kind = ""
    actor_class: type[EngineActor]
    concurrency: int | None = None

    def __init__(
        self, runtime: Runtime, options: ActorOptions, demand: Demand, *, standby: bool = False
    ) -> None:
        self.card = options.card
        self.demand = demand
        self.standby = standby
        self.on_progress: Callable[[str], None] = lambda _: None
        self._placement: Placement | None = None
        self._runtime = runtime
        self._options = options
        self._actor: Actor | None = None
        self._standby = Standby(self._create, self._prepare, self._kill)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.card.name}"

    @property
    def pid(self) -> int | None:
        """The actor's process, None while there is none (or it is on another machine)."""
        actor = self._actor
        return actor.pid if actor and actor.session.place.local and not actor.gone.done() else None

    @property
    def standby_pid(self) -> int | None:
        return self._standby.pid

    @property
    def running(self) -> bool:
        """Whether its actor can be asked, as far as is known."""
        return self._actor is not None and self._actor.loaded is not None and not self._actor.gone.done()

    async def start(self) -> None:
        """Bring up a (new) actor with the model loaded; TuftError says why it cannot be."""
        if self.demand.refusal:
            raise UserError(self.demand.refusal)
        await self.end()
        self.on_progress("starting a worker" if self._runtime.running else "starting Ray, then a worker")
        session = await self._runtime.acquire(self)
        try:
            if self.demand.shared is not None:
                self._placement = await self.demand.shared.join(self, session, self.on_progress)
            spare = self._standby.take(session)
            actor = self._actor = spare or await self._create(session)
            if spare is None:
                await self._await_process(actor)
            await self._load(actor)
        except EngineDied as death:
            await self.give_up()
            raise ServerError(
                f"the {self.kind} worker died while loading {self.card.name}: {death}"
            ) from None
        except BaseException:
            await self.give_up()
            raise
        if self.standby and session.place.local and not session.gpus:
            self._standby.renew(session)

    async def stop(self) -> None:
        """End the actor and its spare; Ray goes with the last engine."""
        await self._standby.end()
        await self.give_up()
        await self._runtime.release(self)

    async def give_up(self) -> None:
        """End the actor, and give the GPUs back that only it still used."""
        await self.end()
        self._placement = None
        if self.demand.shared is not None:
            await self.demand.shared.leave(self)

    def resources(self) -> dict[str, Any]:
        """The actor's process as the lab shows it; empty while there is none. Reads ``/proc``: a millisecond."""
        actor = self._actor
        if actor is None or actor.loaded is None or actor.gone.done():
            return {}
        shown = {
            "name": self.name,
            "pid": actor.pid,
            "device": actor.loaded.device,
            "threads": self._options.threads,
            "load_seconds": round(actor.loaded.seconds, 3),
            "gpu_bytes": actor.gpu_bytes,
        }
        with contextlib.suppress(psutil.Error):
            if actor.process is not None:
                shown |= {"rss_bytes": actor.process.memory_info().rss, "cpu": actor.process.cpu_percent()}
        return shown

    async def _create(self, session: Session) -> Actor:
        loop = asyncio.get_running_loop()
        handle = await self._runtime.thread.run(lambda: self._remote(session))
        actor = Actor(handle, session, loop.create_future())

        def lost(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(actor.leave, reason)

        session.watchers.add(lost)
        actor.gone.add_done_callback(lambda _: session.watchers.discard(lost))
        return actor

    def _remote(self, session: Session) -> Any:
        import ray

        on_gpu = session.gpus > 0 and self.demand.gpus
        environment = dict.fromkeys(SECRETS, "") | {"OMP_NUM_THREADS": str(self._options.threads)}
        environment |= {name: os.environ[name] for name in NETWORK if name in os.environ}
        if not on_gpu:
            environment |= CPU_MEMORY | NO_GPU
        environment |= self.demand.environment
        environment[TRUST] = "1" if self.demand.trusted else "0"
        cpus = self._options.threads if self.demand.cpus is None else self.demand.cpus
        options: dict[str, Any] = {
            "num_cpus": 0 if session.place.local else cpus,  # a Ray of our own counts none
            "num_gpus": self.gpus() if on_gpu else 0,
            "name": f"{self.name} {uuid.uuid4().hex[:8]}",  # as lists of actors show it; no two may be the same
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment},
        }
        if self._placement is not None:
            options |= self._placement.options(self.kind, self.demand.number)
        if self.concurrency is not None:
            options["max_concurrency"] = self.concurrency
        return ray.remote(self.actor_class).options(**options).remote(self.actor_options(on_gpu))

    def gpus(self) -> float:
        """How much of the GPUs an actor asks for, where there are any."""
        return GPU_SHARE

    def actor_options(self, on_gpu: bool) -> ActorOptions:
        """What the actor is told."""
        return self._options

    async def _await_process(self, actor: Actor) -> None:
        """Wait for the actor's process."""
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
                actor.process = psutil.Process(actor.pid)
                actor.session.guard.watch(actor.process)

    async def _prepare(self, actor: Actor) -> None:
        await self._await_process(actor)
        await self._answer(actor, actor.handle.prepare.remote())

    async def _load(self, actor: Actor) -> None:
        self.on_progress("reading the weights")
        loaded: Loaded = await self._answer(actor, actor.handle.load.remote(await self.meeting(actor)))
        if loaded.category:
            raise failure(loaded.category, loaded.error)
        actor.loaded = loaded

    async def meeting(self, actor: Actor) -> str:
        """Where an actor that is one of several finds the others, as torch.distributed writes it; else nothing."""
        return ""

    async def _answer(self, actor: Actor, reference: Any) -> Any:
        """The value of a call, or EngineDied as soon as the actor is gone."""
        from ray.exceptions import RayActorError

        value: asyncio.Future[Any] = asyncio.wrap_future(reference.future())
        value.add_done_callback(lambda done: done.cancelled() or done.exception())  # may never be awaited
        either: list[asyncio.Future[Any]] = [value, actor.gone]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if value.done():
            try:
                return value.result()
            except RayActorError:
                actor.leave(await asyncio.to_thread(self._obituary, actor))
        value.cancel()
        raise EngineDied(actor.gone.result())

    def _ready(self) -> Actor:
        if self._actor is None or self._actor.loaded is None:
            raise EngineDied(f"the {self.kind} worker of {self.card.name} is not running")
        return self._actor

    async def end(self) -> None:
        """Kill the actor and wait until its memory is free again."""
        actor, self._actor = self._actor, None
        if actor is not None:
            await self._kill(actor)

    async def _kill(self, actor: Actor) -> None:
        actor.leave(f"the {self.kind} worker of {self.card.name} was stopped")

        def kill() -> None:
            import ray

            if not actor.session.lost:
                with contextlib.suppress(Exception):  # it may be dead already, and Ray with it
                    ray.kill(actor.handle, no_restart=True)
            if actor.process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    try:
                        actor.process.wait(END_SECONDS)
                    except psutil.TimeoutExpired:
                        actor.process.kill()

        await self._runtime.thread.run(kill)

    def _obituary(self, actor: Actor) -> str:
        """Why an actor is gone, in one line, with the last line it wrote if there is one."""
        said = f"the {self.kind} worker (process {actor.pid or 'not started'}) is gone"
        lines = log_tail(actor.session.logs, actor.pid)
        return f"{said}; its last words: {lines[-1].strip()[:300]}" if lines else said
