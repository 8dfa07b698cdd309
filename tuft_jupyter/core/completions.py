"""Which sample requests of a sampler have ended: for clients that ask for many answers with one poll.

A client gives the cursor it was told last and hears what ended since. Cursors only grow, also across a restart (they
begin at the time of start), and what is at or before a client's cursor is forgotten. One list belongs to one
``(sampler, clone)``, as the SDK polls.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

KEPT = 8192
"""Completions remembered for one list, and lists remembered in all, whether anybody polls or not."""

CLONE_STRIDE = 1_000_000_000
"""A cloned sampler numbers its requests from ``clone * CLONE_STRIDE`` (protocol section 2.9)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """``size_bytes`` is the length of the answer; None means that the request failed."""

    cursor: int
    request_id: str
    size_bytes: int | None


@dataclass(slots=True)
class _List:
    ended: deque[Completion] = field(default_factory=lambda: deque(maxlen=KEPT))
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Completions:
    def __init__(self) -> None:
        self._lists: OrderedDict[tuple[str, int], _List] = OrderedDict()
        self._cursor = int(time.time() * 1000)

    def add(self, sampler: str, seq: int, request_id: str, size_bytes: int | None) -> None:
        self._cursor += 1
        found = self._list(sampler, seq // CLONE_STRIDE)
        found.ended.append(Completion(self._cursor, request_id, size_bytes))
        found.changed.set()

    async def after(
        self, sampler: str, clone: int, cursor: int, seconds: float
    ) -> tuple[list[Completion], int]:
        """What ended after ``cursor``, waiting up to ``seconds`` for something; with the new cursor."""
        found = self._list(sampler, clone)
        while found.ended and found.ended[0].cursor <= cursor:
            found.ended.popleft()
        if not found.ended and seconds > 0:
            found.changed.clear()
            try:
                async with asyncio.timeout(seconds):
                    await found.changed.wait()
            except TimeoutError:
                return [], cursor
        ended = list(found.ended)
        return ended, ended[-1].cursor if ended else cursor

    def _list(self, sampler: str, clone: int) -> _List:
        found = self._lists.setdefault((sampler, clone), _List())
        self._lists.move_to_end((sampler, clone))
        while len(self._lists) > KEPT:
            self._lists.popitem(last=False)
        return found
