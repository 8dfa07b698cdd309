"""Several training engines that are one: the ranks of a data-parallel trainer, started, stepped and ended together.

Every rank is sent the same tasks and gives the same outcomes (:mod:`~tuft_jupyter.engine.parallel` says why); those of
the first are told. The death of one is the death of all: the others could only wait for it. Knows neither Ray nor
torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tuft_jupyter.core.engine import EngineDied, Outcome, Task, TrainingEngine


class Meeting:
    """Where the ranks of one start find each other: a file of this machine, or an address that the first one tells.

    ``given`` is an address that is not asked for.
    """

    def __init__(self, file: Path, given: str | None = None) -> None:
        self.file = file
        self._given = None if given is None else f"tcp://{given}"
        self._told: asyncio.Future[str] | None = None

    def renew(self) -> None:
        """Before each start."""
        self.file.unlink(missing_ok=True)
        self._told = asyncio.get_running_loop().create_future()

    async def on_one_machine(self) -> str:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return f"file://{self.file}"

    async def among_nodes(self, rank: int, ask: Callable[[], Awaitable[str]]) -> str:
        """The address, which the first rank gets from ``ask`` and the others wait for."""
        assert self._told is not None
        if rank == 0:
            self._told.set_result(self._given or await ask())
        return await asyncio.shield(self._told)


class Rank(TrainingEngine, Protocol):
    """An engine whose process can also be ended, with the GPUs that it has (``give_up``) or to start there again."""

    async def end(self) -> None: ...

    async def give_up(self) -> None: ...

    def resources(self) -> dict[str, Any]: ...


class TrainingGroup:
    """Implements ``core.engine.TrainingEngine`` over one engine per rank."""

    def __init__(self, ranks: Sequence[Rank], meeting: Meeting) -> None:
        self.ranks = ranks
        self._meeting = meeting

    @property
    def on_progress(self) -> Callable[[str], None]:
        return self.ranks[0].on_progress

    @on_progress.setter
    def on_progress(self, listener: Callable[[str], None]) -> None:
        self.ranks[0].on_progress = listener

    @property
    def part_tokens(self) -> int:
        """As many tokens as all ranks together take in one pass."""
        return len(self.ranks) * self.ranks[0].part_tokens

    async def start(self) -> None:
        """Bring all ranks up; if one cannot be, none is, and no GPU is kept."""
        await self._end()
        self._meeting.renew()
        try:
            await _all(self._named(rank.start() for rank in self.ranks))
        except BaseException:
            await asyncio.gather(*(rank.give_up() for rank in self.ranks))
            self._meeting.file.unlink(missing_ok=True)
            raise

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run one batch on all ranks. EngineDied, and nothing left of the others, if one went away."""
        try:
            outcomes: list[list[Outcome]] = await _all(self._named(rank.step(tasks) for rank in self.ranks))
        except Exception:
            await self._end()
            raise
        return outcomes[0]

    async def stop(self) -> None:
        await asyncio.gather(*(rank.stop() for rank in self.ranks))
        self._meeting.file.unlink(missing_ok=True)

    def resources(self) -> dict[str, Any]:
        """The first rank's process as the lab shows it."""
        return self.ranks[0].resources()

    def _named(self, work: Iterable[Coroutine[Any, Any, Any]]) -> list[Coroutine[Any, Any, Any]]:
        """The work of each rank, whose death says which one it was."""

        async def named(number: int, one: Coroutine[Any, Any, Any]) -> Any:
            try:
                return await one
            except EngineDied as death:
                raise EngineDied(f"rank {number} of {len(self.ranks)}: {death}") from death

        return [named(number, one) for number, one in enumerate(work)]

    async def _end(self) -> None:
        await asyncio.gather(*(rank.end() for rank in self.ranks))
        self._meeting.file.unlink(missing_ok=True)


async def _all(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The values of all; as soon as one fails, its error, and the rest is cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
