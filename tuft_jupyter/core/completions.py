"""Which sample requests of a sampler have ended: for clients that ask for many answers with one poll.

A client sends the cursor of the last answer and gets what ended since. Cursors only grow, also across a restart (they
begin at the time of start), and what is at or before a client's cursor is forgotten. One list belongs to one
``(sampler, clone)``, as the SDK polls.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection
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
    """Plain values: most samplers are asked one thing, and nobody polls."""

    ended: list[Completion] = field(default_factory=list)
    changed: asyncio.Event | None = None


class Completions:
    def __init__(self) -> None:
        self._lists: OrderedDict[tuple[str, int], _List] = OrderedDict()
        self._cursor = int(time.time() * 1000)

    def add(self, sampler: str, seq: int, request_id: str, size_bytes: int | None) -> None:
        self._cursor += 1
        found = self._list(sampler, seq // CLONE_STRIDE)
        found.ended.append(Completion(self._cursor, request_id, size_bytes))
        if len(found.ended) > KEPT:
            del found.ended[: KEPT // 8]
        if found.changed is not None:
            found.changed.set()

    async def after(
        self, sampler: str, clone: int, cursor: int, seconds: float
    ) -> tuple[list[Completion], int]:
        """What ended after ``cursor``, waiting up to ``seconds`` for something; with the new cursor."""
        found = self._list(sampler, clone)
        found.ended = [one for one in found.ended if one.cursor > cursor]
        if not found.ended and seconds > 0:
            found.changed = found.changed or asyncio.Event()
            found.changed.clear()
            try:
                async with asyncio.timeout(seconds):
                    await found.changed.wait()
            except TimeoutError:
                return [], cursor
        ended = list(found.ended)
        return ended, ended[-1].cursor if ended else cursor

    def forget(self, samplers: Collection[str]) -> None:
        for key in [key for key in self._lists if key[0] in samplers]:
            del self._lists[key]

    def _list(self, sampler: str, clone: int) -> _List:
        found = self._lists.setdefault((sampler, clone), _List())
        self._lists.move_to_end((sampler, clone))
        while len(self._lists) > KEPT:
            self._lists.popitem(last=False)
        return found
