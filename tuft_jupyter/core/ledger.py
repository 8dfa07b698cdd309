"""The ledger: a journal with everything that is folded from it, always in step.

Whatever happens is recorded here first; state, promises and feed follow in the journal's order. So what was true
before a restart is true after it, and what a client was told is never ahead of what is kept. It knows no engine.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tuft_jupyter.core import state as fold
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.feed import Feed
from tuft_jupyter.core.idempotency import SeenRequests
from tuft_jupyter.core.image import plain, state_of
from tuft_jupyter.core.journal import FOLDED, Damaged, Journal
from tuft_jupyter.core.promises import Answer, Promise, Promises
from tuft_jupyter.core.types import JSON, Op, OpKind, Record

RESULT_SECONDS = 86400.0
"""How long a result waits for its client."""
FETCHED_SECONDS = 600.0
"""How long a result stays after its client had it: its answer may have been lost on the way."""
SLACK = 2**20
"""Characters of records below which the journal is not compacted."""


class Ledger:
    """``state``, ``promises``, ``seen`` and ``feed`` may be read by anybody; only :meth:`record` changes them.

    ``result_seconds`` is how long a result waits for its client (None: for ever).
    """

    def __init__(
        self,
        journal: Journal,
        clock: Callable[[], float] | None = None,
        result_seconds: float | None = RESULT_SECONDS,
    ) -> None:
        self.journal = journal
        self.clock = clock or steady_clock()
        self.result_seconds = result_seconds
        self.state = fold.State()
        self.promises = Promises()
        self.seen = SeenRequests()
        self.feed = Feed()
        self.observers: list[Callable[[Record, float], None]] = []
        """called with each new record and the seconds until it was durable"""
        self.relocate: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda args: args
        """an op's arguments, with the directories of today"""
        self.heard: Callable[[str], float] = lambda owner: math.inf
        """when the client of a run or sampler was last heard of"""
        self._answers: dict[str, Answer] = {}
        self._spent: list[int] = []

    async def open(self) -> None:
        """Read the journal; afterwards ``state``, ``promises`` and ``seen`` are as they were.

        It may be tried again after it failed.
        """
        self.state, self.promises, self.seen = fold.State(), Promises(), SeenRequests()
        await self.journal.open(self._follow)

    async def close(self) -> None:
        await self.journal.close()

    async def record(
        self,
        kind: str,
        tenant: str,
        data: Mapping[str, Any],
        blob: bytes | None = None,
        answer: Answer | None = None,
    ) -> Record:
        """Append a record; when this returns it is durable and folded. ``answer`` settles its op's promise."""
        if answer is not None:
            self._answers[data["request_id"]] = answer
        began = time.perf_counter()
        try:
            kept = await self.journal.append(Record(kind, tenant, data, self.clock(), blob=blob))
            for observe in self.observers:
                observe(kept, time.perf_counter() - began)
            return kept
        finally:
            if answer is not None:
                self._answers.pop(data["request_id"], None)

    async def op(self, accepted: int) -> Op:
        """The op that record ``accepted`` accepted, whole again; Damaged if it is not there any more as it was."""
        record = await self.journal.read(accepted)
        if record is None:
            raise Damaged(f"record {accepted} is not in the journal")
        data = record.data
        return Op(
            request_id=data["request_id"],
            run=data["run"],
            seq=data["seq"],
            kind=OpKind(data["op"]),
            tenant=record.tenant,
            tokens=data["tokens"],
            args=self.relocate(data["args"]),
            body=record.blob or b"",
            content_type=data.get("content_type", JSON),
        )

    async def answer(self, answer: Answer) -> Answer:
        """An answer with its body, read back from the journal if it had left memory."""
        if answer.body is None and not answer.category:
            record = await self.journal.read(answer.record)
            body = record.blob if record is not None else None
            if body is None:
                return Answer(category="server", error="the result of this request has expired")
            return Answer(body, answer.content_type, record=answer.record, time=answer.time)
        return answer

    async def tidy(self) -> None:
        """Let go of results and bodies that nobody needs, and compact the journal when it has grown enough."""
        gone = self.promises.expire(self.clock(), self.result_seconds, FETCHED_SECONDS, self.heard)
        spent, self._spent = self._spent, []
        try:
            await self.journal.drop_blobs([*gone, *spent])
        except Overloaded:
            self._spent += [*gone, *spent]  # they are asked for again
            raise
        since, image = self.journal.weight
        if since > image + SLACK:
            await self.compact()

    async def compact(self) -> None:
        """Put an image of all that is known into the place of the records that told it."""
        promises = self.promises.kept(self.state.accepted)
        at = self.state.n
        keep = set(self.state.accepted.values()) | {p.answer.record for p in promises if p.answer is not None}
        for run in self.state.runs.values():
            keep.update(run.replay)
        live = {run.id for run in self.state.runs.values() if run.status in ("creating", "ready")}
        image = {
            "state": plain(self.state),
            "seen": self.seen.image(live),
            "promises": [
                [p.request_id, p.tenant, p.owner, plain(p.answer and _kept(p.answer))] for p in promises
            ],
        }
        # Many megabytes may take a second: not on the loop.
        text = await asyncio.to_thread(json.dumps, image, separators=(",", ":"), allow_nan=False)
        await self.journal.compact(at, text, keep)

    def _follow(self, record: Record) -> None:
        if record.kind == FOLDED:
            self._restore(record.data)
            return
        data = record.data
        accepted = self.state.accepted.get(data.get("request_id", ""), 0)
        fold.apply(self.state, record)
        if record.kind == "op_accepted":
            self.promises.open(data["request_id"], record.tenant, data["run"])
            self.seen.add(data["run"], data["seq"], data["digest"], data["request_id"])
        elif record.kind == "op_done":
            answer = self._answers.get(data["request_id"]) or Answer(content_type=data["content_type"])
            answer.record, answer.time = record.n, record.time
            self.promises.settle(data["request_id"], answer)
            self._forget_body(data["run"], accepted)
            if self.state.runs[data["run"]].status in fold.ENDED:
                self.seen.drop(data["run"])
        elif record.kind == "op_failed":
            failed = Answer(None, "", data["category"], data["error"], record.n, record.time)
            self.promises.settle(data["request_id"], failed)
            self._forget_body(data["run"], accepted)
        self.feed.publish(record)

    def _forget_body(self, run: str, accepted: int) -> None:
        if accepted and accepted not in self.state.runs[run].replay[-1:]:
            self._spent.append(accepted)

    def _restore(self, image: Mapping[str, Any]) -> None:
        self.state = state_of(image["state"])
        self.seen.restore(image["seen"])
        for request_id, tenant, owner, answer in image["promises"]:
            self.promises.restore(
                Promise(request_id, tenant, owner, None if answer is None else Answer(**answer))
            )
        self.feed.anew()  # whoever listens by now knows nothing of what the image told


def _kept(answer: Answer) -> Answer:
    """Without the body: it has its own place in the journal."""
    return replace(answer, body=None)


def steady_clock() -> Callable[[], float]:
    """Seconds since the epoch, counted from now on: setting the machine's clock makes nothing older or younger."""
    began = time.time() - time.monotonic()
    return lambda: began + time.monotonic()
