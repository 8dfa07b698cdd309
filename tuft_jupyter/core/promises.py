"""Promises: the answers that clients wait for, by request id.

A promise is opened when its request is accepted and settled once. Whoever owns it may ask for the answer as often
as it likes; the asking never changes it. Answers are held in memory up to ``capacity`` bytes; beyond that the oldest
go. A training answer that went can be read from the journal again (its ``record`` says where), a sample is gone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tuft_jupyter.core.errors import Lost
from tuft_jupyter.core.types import JSON, Principal

KEPT = 200_000
"""Settled promises remembered at most (a few hundred bytes each, without their answers)."""


@dataclass(slots=True)
class Answer:
    """What a request came to: ``body`` for success, else ``category`` and ``error``."""

    body: bytes | None = None
    content_type: str = JSON
    category: str = ""
    error: str = ""
    record: int = 0
    time: float = 0.0
    """when it was there, in seconds since the epoch"""


@dataclass(slots=True, eq=False)
class Promise:
    request_id: str
    tenant: str
    owner: str
    """The run or sampler the request belongs to."""
    answer: Answer | None = None
    waiters: asyncio.Event | None = None
    fetched: float | None = None
    """when its client first had the answer"""


class Promises:
    def __init__(self, capacity: int = 256 * 2**20) -> None:
        self.capacity = capacity
        self._promises: OrderedDict[str, Promise] = OrderedDict()
        self._held: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0

    def open(self, request_id: str, tenant: str, owner: str) -> Promise:
        promise = self._promises.get(request_id)
        if promise is None:
            promise = self._promises[request_id] = Promise(request_id, tenant, owner)
            self._forget_old()
        return promise

    def settle(self, request_id: str, answer: Answer) -> None:
        """Give the answer to everybody who waits, and to everybody who asks later."""
        promise = self._promises.get(request_id)
        if promise is None or (promise.answer is not None and promise.answer.body is not None):
            return
        promise.answer = answer
        if answer.body is not None:
            self._hold(request_id, len(answer.body))
        if promise.waiters is not None:
            promise.waiters.set()
            promise.waiters = None

    def get(self, principal: Principal, request_id: str) -> Promise:
        """The principal's own promise. Lost (410) for ids this server does not know, so that a sampler asks anew."""
        promise = self._promises.get(request_id)
        if promise is None or not (principal.admin or promise.tenant == principal.tenant):
            raise Lost(
                f"request {request_id!r} is not known here: it was lost in a restart, has expired, "
                "or belongs to somebody else; send the request again"
            )
        return promise

    async def wait(self, promise: Promise, seconds: float) -> Answer | None:
        """The answer, or None if there is none within that time."""
        if promise.answer is None:
            if promise.waiters is None:
                promise.waiters = asyncio.Event()
            try:
                async with asyncio.timeout(seconds):
                    await promise.waiters.wait()
            except TimeoutError:
                return None
        return promise.answer

    def expire(
        self, now: float, unfetched: float | None, fetched: float, heard: Callable[[str], float]
    ) -> list[int]:
        """Forget answers that wait for longer than that many seconds (None: for ever), or were fetched so long ago.

        ``heard`` says when an owner's client was last heard of: while it was not since an answer went out, the answer
        may not have arrived, and counts as fetched now. Returns the records that the journal may forget as well.
        """
        gone = []
        for promise in list(self._promises.values()):
            answer = promise.answer
            if answer is None:
                continue
            answer.time = answer.time or now
            if promise.fetched is not None and heard(promise.owner) < promise.fetched:
                promise.fetched = now
            late = unfetched is not None and now - answer.time > unfetched
            if late or (promise.fetched is not None and now - promise.fetched > fetched):
                self._drop(promise.request_id)
                if answer.record:
                    gone.append(answer.record)
        return gone

    def kept(self, accepted: Collection[str]) -> list[Promise]:
        """The promises that outlive a restart, ``accepted`` being what is run again after it: not those of samples."""
        return [
            promise
            for promise in self._promises.values()
            if (promise.request_id in accepted if promise.answer is None else promise.answer.record)
        ]

    def restore(self, promise: Promise) -> None:
        self._promises[promise.request_id] = promise

    def pending(self, owner: str) -> int:
        return sum(1 for p in self._promises.values() if p.owner == owner and p.answer is None)

    def _hold(self, request_id: str, size: int) -> None:
        self._held[request_id] = size
        self._bytes += size
        while self._bytes > self.capacity and len(self._held) > 1:
            oldest, freed = self._held.popitem(last=False)
            self._bytes -= freed
            promise = self._promises.get(oldest)
            if promise is not None and promise.answer is not None:
                if promise.answer.record:
                    promise.answer.body = None
                else:
                    del self._promises[oldest]

    def _forget_old(self) -> None:
        while len(self._promises) > KEPT:
            oldest = next(iter(self._promises))
            if self._promises[oldest].answer is None:
                self._promises.move_to_end(oldest)
                return
            self._drop(oldest)

    def _drop(self, request_id: str) -> None:
        del self._promises[request_id]
        self._bytes -= self._held.pop(request_id, 0)
