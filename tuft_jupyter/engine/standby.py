"""A spare worker process that has imported what it needs, for the moment at which the one that works dies.

Four of the five seconds that a new worker takes are spent on importing torch, transformers and PEFT. A spare holds no
model and no device. It is brought up a little after each start, so that it takes no time from whoever waits for that
one, and it is only ever used once. How a process is brought up and ended is passed in; this module decides when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psutil

from tuft_jupyter.engine.actor import Actor
from tuft_jupyter.engine.ray_runtime import Session

log = logging.getLogger(__name__)

DELAY_SECONDS = 3.0
"""After a start: first its own work."""
FREE_BYTES = 2 * 2**30
"""Memory that must be free: a spare takes a sixth of it."""


class Standby:
    """``create`` makes an actor, ``prepare`` returns once it has a pid and has imported everything, ``end`` ends it."""

    def __init__(
        self,
        create: Callable[[Session], Awaitable[Actor]],
        prepare: Callable[[Actor], Awaitable[None]],
        end: Callable[[Actor], Awaitable[None]],
    ) -> None:
        self._create, self._prepare, self._end = create, prepare, end
        self._actor: Actor | None = None
        self._prepared = False
        self._making: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process of a spare that is ready, None while there is none."""
        actor = self._actor
        return actor.pid if actor is not None and self._prepared and actor.alive else None

    def renew(self, session: Session) -> None:
        """Have a spare some seconds from now, unless there is one."""
        if self.pid is None and (self._making is None or self._making.done()):
            self._making = asyncio.get_running_loop().create_task(self._make(session))

    def take(self, session: Session) -> Actor | None:
        """The spare, which is the caller's from now on; None if there is none, or it has no process yet."""
        actor = self._actor
        if actor is None or not actor.pid:
            return None
        self._actor = None
        return actor if actor.alive and actor.session is session else None

    async def end(self) -> None:
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        actor, self._actor = self._actor, None
        if actor is not None:
            await self._end(actor)

    async def _make(self, session: Session) -> None:
        await asyncio.sleep(DELAY_SECONDS)
        if session.lost or psutil.virtual_memory().available < FREE_BYTES:
            return
        self._prepared = False
        actor: Actor | None = None
        try:
            actor = self._actor = await self._create(session)
            await self._prepare(actor)
            self._prepared = True
        except Exception as error:  # noqa: BLE001 - work goes on without one, whatever it was
            log.warning("there is no standby worker: %s", error)
            if actor is not None and self._actor is actor:  # else somebody took it meanwhile, and will see
                self._actor = None
                await self._end(actor)
