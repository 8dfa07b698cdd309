"""The ledger: a journal with everything that is folded from it, always in step.

Whatever happens is recorded here first; state, promises and feed follow in the journal's order. So what was true
before a restart is true after it, and what a client was told is never ahead of what is kept. It knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tuft_jupyter.core import state as fold
from tuft_jupyter.core.feed import Feed
from tuft_jupyter.core.journal import Journal
from tuft_jupyter.core.promises import Answer, Promises
from tuft_jupyter.core.types import JSON, Op, OpKind, Record


class Ledger:
    """``state``, ``promises`` and ``feed`` may be read by anybody; only :meth:`record` changes them."""

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.time) -> None:
        self.journal = journal
        self.clock = clock
        self.state = fold.State()
        self.promises = Promises()
        self.feed = Feed()
        self.accepted: list[tuple[str, int, str, str]] = []
        """(run, seq, digest, request id) of the ops that the journal held when it was opened, for the lanes"""
        self._answers: dict[str, Answer] = {}

    async def open(self) -> None:
        """Read the journal; afterwards ``state`` and ``promises`` are as they were."""
        await self.journal.open(self._recover)

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
        try:
            return await self.journal.append(Record(kind, tenant, data, blob=blob))
        finally:
            if answer is not None:
                self._answers.pop(data["request_id"], None)

    async def op(self, accepted: int) -> Op:
        """The op that record ``accepted`` accepted, whole again."""
        record = await self.journal.read(accepted)
        if record is None:
            raise LookupError(f"record {accepted} is not in the journal")
        data = record.data
        return Op(
            request_id=data["request_id"],
            run=data["run"],
            seq=data["seq"],
            kind=OpKind(data["op"]),
            tenant=record.tenant,
            tokens=data["tokens"],
            args=data["args"],
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
            return Answer(body, answer.content_type, record=answer.record)
        return answer

    def _recover(self, record: Record) -> None:
        self._follow(record)
        if record.kind == "op_accepted":
            data = record.data
            self.accepted.append((data["run"], data["seq"], data["digest"], data["request_id"]))

    def _follow(self, record: Record) -> None:
        fold.apply(self.state, record)
        data = record.data
        if record.kind == "op_accepted":
            self.promises.open(data["request_id"], record.tenant, data["run"])
        elif record.kind == "op_done":
            answer = self._answers.get(data["request_id"]) or Answer(content_type=data["content_type"])
            answer.record = record.n
            self.promises.settle(data["request_id"], answer)
        elif record.kind == "op_failed":
            failed = Answer(category=data["category"], error=data["error"], record=record.n)
            self.promises.settle(data["request_id"], failed)
        self.feed.publish(record)
