"""The watchdog: a training engine that cannot hang, only die.

A worker that is stuck (a deadlocked kernel, a device driver that never returns, a file system that went away) looks
like one that is slow. So the timeout of a step follows its cost: ten times what steps of its size took so far, at least
a minute, and a quarter of an hour while nothing has been measured or files are written. A worker that exceeds it is
ended and reported as dead, and the driver rebuilds its runs. It knows neither lanes nor journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuft_jupyter.core.engine import EngineDied, Outcome, Task, TrainingEngine
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.core.types import OpKind

log = logging.getLogger("tuft_jupyter.watchdog")

MEASURED = {OpKind.FORWARD, OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP}
"""Ops whose time goes with their tokens; any other reads or writes files."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a step may take: ``factor`` times its expected time, but at least ``least``; ``unknown`` where
    nothing can be expected; ``start`` for loading the model."""

    least: float = 60.0
    factor: float = 10.0
    unknown: float = 900.0
    start: float = 3600.0


class Watchdog:
    """Implements :class:`TrainingEngine` over another one. ``longest`` is the model's context length in tokens: one
    datum of that length is always worked on as a whole, whatever was granted."""

    def __init__(
        self,
        engine: TrainingEngine,
        longest: int,
        timeouts: Timeouts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.longest = longest
        self.timeouts = timeouts or Timeouts()
        self._clock = clock
        self._seconds_per_token: float | None = None
        self._ahead = 0.0

    @property
    def on_progress(self) -> Callable[[str], None]:
        return self.engine.on_progress

    @on_progress.setter
    def on_progress(self, listener: Callable[[str], None]) -> None:
        self.engine.on_progress = listener

    @property
    def part_tokens(self) -> int:
        return self.engine.part_tokens

    async def start(self) -> None:
        try:
            async with asyncio.timeout(self.timeouts.start):
                await self.engine.start()
        except TimeoutError:
            await self.engine.stop()
            raise ServerError(f"the model was not loaded within {self.timeouts.start:g} s") from None

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """As :meth:`TrainingEngine.step`. A call made while another runs has that one's time added to its own."""
        ahead, allowed = self._ahead, self._allowed(tasks)
        self._ahead += allowed
        began = self._clock()
        try:
            async with asyncio.timeout(ahead + allowed):
                outcomes = await self.engine.step(tasks)
        except TimeoutError:
            seconds = self._clock() - began
            log.error("the training worker has not answered for %.0f s and is ended", seconds)
            await self.engine.stop()
            raise EngineDied(f"it did not answer for {seconds:.0f} s and was ended") from None
        finally:
            self._ahead -= allowed
        if not ahead:
            self._learn(tasks, self._clock() - began)
        return outcomes

    async def stop(self) -> None:
        await self.engine.stop()

    def _allowed(self, tasks: Sequence[Task]) -> float:
        if self._seconds_per_token is None or any(task.kind not in MEASURED for task in tasks):
            return self.timeouts.unknown
        tokens = max(self.longest, sum(task.grant for task in tasks))
        return max(self.timeouts.least, self.timeouts.factor * tokens * self._seconds_per_token)

    def _learn(self, tasks: Sequence[Task], seconds: float) -> None:
        """Remember the slower steps for longer: the next one may be as slow again."""
        tokens = sum(task.grant for task in tasks)
        if tokens and all(task.kind in MEASURED for task in tasks):
            now = seconds / tokens
            self._seconds_per_token = max(now, 0.95 * (self._seconds_per_token or now))
