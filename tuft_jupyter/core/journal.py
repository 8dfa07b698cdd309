"""The journal of operations: the only truth. What every kind of journal promises, and the one that is kept in memory.

A journal numbers records, makes them durable, and then hands each to its ``sink`` on the event loop, in order and
before the ``append`` that wrote it returns. It knows nothing of what the records mean. Promises: what an ``append``
returned survives as :class:`Durability` says; appends that wait together share one commit; an append that failed left
nothing behind; two servers never write one journal.

``journal_sqlite`` and ``journal_redis`` keep theirs for longer than the process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.types import Record

Sink = Callable[[Record], None]

log = logging.getLogger("tuft_jupyter.journal")

FOLDED = "folded"
"""The kind of the record that stands for all before it; its data is the ledger's image."""


class Durability(StrEnum):
    """What an acknowledged record survives."""

    NOTHING = "nothing"
    """lost when the server stops"""
    PROCESS = "process"
    """survives the server's death; the last seconds may be lost when the machine that keeps the journal fails"""
    MACHINE = "machine"
    """on disk before it is acknowledged: survives the death of the machine"""


class Unavailable(ServerError):
    """The journal cannot be taken over now, and perhaps later: another server writes it, or it does not answer."""


class Damaged(ServerError):
    """What was read is not what was written; the message names the record. ``record`` is the part that is whole."""

    def __init__(self, message: str, record: Record | None = None) -> None:
        super().__init__(message)
        self.record = record


class ReadOnly(Overloaded):
    """The journal takes nothing until somebody mends what the message names."""


class Journal(Protocol):
    """Where records go. ``description`` says in words what survives what; ``problem``, why nothing can be written.

    ``address`` is where clients reach this server (set before ``open``; "" if nowhere that others could name), and
    ``elsewhere`` where they reach the one that writes instead of it, as far as that is known.
    """

    description: str
    durability: Durability
    problem: str
    address: str
    elsewhere: str

    async def open(self, sink: Sink) -> None:
        """Take the journal over and hand every record it holds to ``sink`` (without blobs), oldest first.

        Unavailable while another server has it. If a part cannot be read, the records before it are told, ``problem``
        names it, and appends are refused.
        """

    async def append(self, record: Record) -> Record:
        """Number and keep a record; returns it once ``sink`` saw it (without blob). Overloaded if it cannot be kept."""

    async def read(self, n: int) -> Record | None:
        """Record ``n`` with its blob, as long as the blob is kept. Damaged if it is not what was written."""

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        """Forget blobs that no replay and no client needs any more."""

    async def compact(self, n: int, image: str, keep: Collection[int]) -> None:
        """Put ``image`` (JSON) in the place of all records up to ``n``; of those, only ``keep`` stay readable."""

    @property
    def weight(self) -> tuple[int, int]:
        """(characters of the records since the last image, characters of that image)."""

    async def close(self) -> None: ...


def hand_over(sink: Sink, record: Record, appended: asyncio.Future[Record]) -> None:
    """Give a durable record to the sink and answer whoever appended it; a sink that fails fails that append alone."""
    try:
        sink(record)
    except Exception as error:
        log.exception("record %d (%s) is durable, but could not be applied", record.n, record.kind)
        if not appended.done():
            appended.set_exception(error)
    else:
        if not appended.done():  # else the one who asked went away; what was written stays written
            appended.set_result(record)


class MemoryJournal:
    """Keeps everything in this process; all is lost when it ends (``persistence: disabled``)."""

    description = "memory only: everything is lost when the server stops"
    durability = Durability.NOTHING
    problem = ""
    address = elsewhere = ""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._n = 0
        self._records: dict[int, Record] = {}
        self._since = 0
        self._sink: Sink = lambda record: None

    async def open(self, sink: Sink) -> None:
        self._sink = sink

    async def append(self, record: Record) -> Record:
        self._n += 1
        self._since += 1
        numbered = replace(record, n=self._n, time=record.time or self._clock())
        if record.blob is not None:
            self._records[self._n] = numbered
        self._sink(replace(numbered, blob=None))
        return numbered

    async def read(self, n: int) -> Record | None:
        return self._records.get(n)

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        for n in numbers:
            self._records.pop(n, None)

    async def compact(self, n: int, image: str, keep: Collection[int]) -> None:
        for old in [number for number in self._records if number <= n and number not in keep]:
            del self._records[old]
        self._since = self._n - n

    @property
    def weight(self) -> tuple[int, int]:
        return self._since * 400, 0  # records without blobs are not kept at all: a usual size stands for them

    async def close(self) -> None:
        self._records.clear()
