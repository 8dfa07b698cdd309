"""The driver: feeds one base model's training worker, and brings it back when it dies.

It takes what :class:`Lanes` chooses, runs it as one step, and records each outcome. A worker holds nothing that cannot
be made again: after its death each run is rebuilt, when its next op comes up, from its last snapshot by replaying the
ops done since, in order; the client only waits a little longer. The driver knows no HTTP and no torch.

Promises: an op's outcome is recorded before any client gets it; an op that took the worker down twice, or server after
server, fails alone; a death is held against those ops only that had been begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

from tuft_jupyter.core.engine import EngineDied, Outcome, Task, TrainingEngine
from tuft_jupyter.core.errors import Overloaded, TuftError
from tuft_jupyter.core.lanes import Entry, Grant, Lane, Lanes
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.replay import CannotReplay, replay
from tuft_jupyter.core.snapshots import Snapshots
from tuft_jupyter.core.startup import bring_up
from tuft_jupyter.core.state import CREATES_RUN, ENDED
from tuft_jupyter.core.types import ModelCard, Op, OpKind

log = logging.getLogger("tuft_jupyter.driver")

MAX_ATTEMPTS = 2
"""Times an op may be in a batch whose worker dies before it is failed itself."""

MAX_SERVERS = 3
"""Servers that may begin an op again and end before they are done with it, before it is failed: where the memory of a
whole container is limited, one op can end all that runs in it, at each of its starts."""

MAX_REBUILDS = 3
"""Workers in a row that may die while they bring one run back, before the ops that wait for it are failed."""


class Driver:
    """``status`` is "idle", "loading", "ready" or "failed"; ``detail`` says why."""

    def __init__(
        self,
        card: ModelCard,
        engine: TrainingEngine,
        lanes: Lanes,
        ledger: Ledger,
        snapshots: Snapshots,
    ) -> None:
        self.card = card
        self.engine = engine
        self.lanes = lanes
        self.ledger = ledger
        self.snapshots = snapshots
        self.status = "idle"
        self.detail = ""
        self.used = ledger.clock()
        """when the worker was last asked for something"""
        self._closing = False
        self._resting = False
        self._wanted = asyncio.Event()
        self._leaving: set[str] = set()
        self._working: deque[Sequence[Grant]] = deque()
        """Batches that the worker has not answered yet, in the order in which it works on them."""

    def wake(self) -> None:
        """Bring the worker up now, before there is work for it."""
        self._wanted.set()

    def release(self, run: str) -> None:
        """Let a run's adapter leave the worker when its lane is empty; it comes back when it is used again."""
        self._leaving.add(run)
        if self.status == "ready":  # no worker is started to let something go
            self.wake()

    def rest(self) -> None:
        """Let the worker itself go, unless it holds a run or has work; the next op starts another."""
        if self.status == "ready":
            self._resting = True
            self.wake()

    async def forget_idle(self) -> None:
        """Keep nothing of runs that no worker holds and that wait for nothing; what is closed leaves the disk, too."""
        for lane in list(self.lanes.by_run.values()):
            run = self.ledger.state.runs.get(lane.run)
            if run is None or lane.queue or (lane.resident and run.status not in ENDED):
                continue
            self.lanes.drop(run.id)
            self.snapshots.forget(run.id)
            if run.status in ENDED:
                await self.snapshots.remove(run.id, run.snapshot)

    def close(self) -> None:
        """Finish the step that is being worked on, and begin nothing more."""
        self._closing = True
        self.wake()

    async def run(self) -> None:
        """Serve until closed or cancelled."""
        while True:
            await self._wait_for_work()
            if self._closing:
                return
            if self.status != "ready":
                await self._start()
                continue
            try:
                await self._release_leaving()
                if await self._rested():
                    continue
                await self._anticipate()
                batch = self.lanes.next_batch()
                if batch:
                    await self._step(batch)
            except EngineDied as death:
                self._lost(str(death))
            except Exception as bug:  # a driver that dies would park every client for ever
                log.exception("the driver of %s failed", self.card.name)
                self._lost(f"{type(bug).__name__}: {bug}")

    async def stop(self) -> None:
        """Write down what is not yet in a snapshot, then stop the worker."""
        try:
            if self.status == "ready":
                for lane in list(self.lanes.by_run.values()):
                    # Nothing pending: what was done and could not be recorded would be in it, and is done again.
                    if lane.resident and not self.ledger.state.runs[lane.run].pending:
                        await self._snapshot(lane)
        except (EngineDied, TuftError) as error:
            log.warning("no last snapshot of %s: %s", self.card.name, error)
        await self.engine.stop()

    async def _wait_for_work(self) -> None:
        waits = [asyncio.ensure_future(self.lanes.work()), asyncio.ensure_future(self._wanted.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._wanted.clear()

    async def _anticipate(self) -> None:
        """Give a light tenant that works step by step the moment it needs, before a heavy part is begun."""
        while (pause := self.lanes.anticipation()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.lanes.arrival()

    async def _start(self) -> None:
        self.status = "loading"
        try:
            await bring_up(self.engine, self.card.name, self._say)
        except TuftError as error:
            self.status, self.detail = "failed", error.message
            await self._fail_all(error.category, f"{self.card.name} cannot be loaded: {error.message}")
        else:
            self.status, self.detail = "ready", ""
            self.used = self.ledger.clock()
            if self.engine.part_tokens:
                self.lanes.set_budget(self.engine.part_tokens)

    async def _rested(self) -> bool:
        """End the worker, if that was asked for and nothing has come since."""
        resting, self._resting = self._resting, False
        if not resting or any(lane.resident or lane.queue for lane in self.lanes.by_run.values()):
            return False
        self.status, self.detail = "idle", ""
        await self.engine.stop()
        log.info("the training worker of %s ended: nobody used it", self.card.name)
        return True

    def _say(self, detail: str) -> None:
        self.detail = detail

    def _lost(self, reason: str) -> None:
        """The worker is gone: everything it held is to be rebuilt, and the batch it was working on is suspect."""
        for grant in self._working[0] if self._working else ():
            grant.entry.attempts += 1
        self._working.clear()
        log.warning(
            "the training worker of %s died (%s); its runs are rebuilt as they are used",
            self.card.name,
            reason,
        )
        self.status, self.detail = "idle", "restarting the training worker"
        for lane in self.lanes.by_run.values():
            lane.resident = False
            lane.send_anew()

    async def _fail_all(self, category: str, error: str) -> None:
        for lane in list(self.lanes.by_run.values()):
            await self._fail_lane(lane, category, error)

    async def _fail_lane(self, lane: Lane, category: str, error: str) -> None:
        while lane.queue:
            await self._failed(Grant(lane, lane.queue[0], 0), category, error)

    async def _step(self, batch: list[Grant]) -> None:
        self.used = self.ledger.clock()
        for grant in batch:
            if why := _too_often(grant.entry):
                await self._failed(grant, "server", f"{why} this request, so it is not tried again")
                return
        await self._own([grant.entry for grant in batch if grant.entry.left_over])
        for lane in _lanes_of(batch):
            if not lane.resident and lane.queue and not await self._rebuild(lane):
                return
        first = self._send(batch)
        trailing = await self._trailing_steps(batch, first)
        second = self._send(trailing)
        await self._settled(batch, await first)
        await self._settled(trailing, await second)
        for lane in _lanes_of(batch):
            if self._snapshot_due(lane):
                await self._snapshot(lane)

    async def _own(self, left_over: Sequence[Entry]) -> None:
        """Put on record that this server begins what an earlier one accepted, before it can end this one, too."""
        await asyncio.gather(*(self._record("op_begun_again", entry.op, {}) for entry in left_over))
        for entry in left_over:
            entry.left_over = False

    def _send(self, batch: Sequence[Grant]) -> asyncio.Future[list[Outcome]]:
        """Hand a batch to the engine, which works batches off in the order in which they come."""
        tasks = [_task(grant) for grant in batch]
        for grant in batch:
            grant.entry.sent = True
        if batch:
            self._working.append(batch)
        answer = asyncio.ensure_future(self.engine.step(tasks) if tasks else _nothing())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # may never be awaited
        return answer

    async def _trailing_steps(
        self, batch: list[Grant], running: asyncio.Future[list[Outcome]]
    ) -> list[Grant]:
        """While a batch runs, wait for the optimizer steps behind its passes: they need not wait for our answer."""
        trailing = self.lanes.trailing_steps(batch)
        while not trailing and not running.done():
            arrival = asyncio.ensure_future(self.lanes.arrival())
            either: list[asyncio.Future[Any]] = [running, arrival]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            arrival.cancel()
            trailing = self.lanes.trailing_steps(batch)
        return [] if running.done() else trailing

    async def _settled(self, batch: Sequence[Grant], outcomes: Sequence[Outcome]) -> None:
        if batch:
            self._working.popleft()
        await asyncio.gather(*(self._settle(g, o) for g, o in zip(batch, outcomes, strict=True)))

    async def _settle(self, grant: Grant, outcome: Outcome) -> None:
        if outcome.category:
            if outcome.facts.get("dirty"):
                grant.lane.resident = False
            await self._failed(grant, outcome.category, outcome.error)
        elif not outcome.finished:
            grant.entry.done = outcome.facts.get("tokens", grant.entry.done + grant.tokens)
        else:
            await self._done(grant, outcome)

    async def _done(self, grant: Grant, outcome: Outcome) -> None:
        op = grant.entry.op
        self.lanes.finish(grant)
        if op.kind in CREATES_RUN:
            grant.lane.resident = True
            if op.kind is OpKind.LOAD_WEIGHTS:  # its checkpoint may be deleted later: do not depend on it
                self.snapshots.hurry(op.run)
        elif op.kind is OpKind.UNLOAD_MODEL:
            grant.lane.resident = False
        elif op.kind is OpKind.OPTIM_STEP:
            self.snapshots.stepped(op.run)
        data = {
            "facts": {**outcome.facts, **op.args.get("facts", {})},
            "content_type": outcome.content_type,
        }
        await self._record("op_done", op, data, Answer(outcome.result, outcome.content_type))

    async def _failed(self, grant: Grant, category: str, error: str) -> None:
        self.lanes.finish(grant)
        await self._record("op_failed", grant.entry.op, {"category": category, "error": error})

    async def _record(self, kind: str, op: Op, data: dict[str, Any], answer: Answer | None = None) -> None:
        """Record an outcome; while the journal cannot take it, wait: the work is done and must not be lost."""
        data = {"request_id": op.request_id, "run": op.run, "seq": op.seq, "op": op.kind.value, **data}
        while True:
            try:
                await self.ledger.record(kind, op.tenant, data, answer.body if answer else None, answer)
                return
            except Overloaded as full:
                log.error("waiting to record %s of %s: %s", kind, op.run, full)
                await asyncio.sleep(full.retry_after)

    async def _rebuild(self, lane: Lane) -> bool:
        """Bring a run back into the worker as the journal tells it; False if its lane was failed instead."""
        run = self.ledger.state.runs[lane.run]
        if run.status == "creating":
            lane.resident = True  # its first op makes it
            return True
        if run.status in ENDED:  # these were accepted before it was
            why = run.error or "it was unloaded"
            await self._fail_lane(lane, "user", f"model {run.id!r} cannot be used any more: {why}")
            return False
        try:
            await replay(run, self.engine, self.ledger, self.lanes.budget)
        except (TuftError, CannotReplay) as error:
            log.error("run %s cannot be rebuilt: %s", run.id, error)
            await self._fail_lane(lane, "server", f"{_NOT_BACK}: {error}")
            return False
        except EngineDied as death:
            lane.deaths += 1
            if lane.deaths == MAX_REBUILDS:
                lane.deaths = 0
                log.error("run %s takes its worker down while it is rebuilt: %s", run.id, death)
                text = (
                    f"{_NOT_BACK}: {MAX_REBUILDS} workers in a row died of it. The last: {death}. Try again"
                )
                await self._fail_lane(lane, "server", text)
            raise
        lane.resident, lane.deaths = True, 0
        lane.send_anew()
        self.snapshots.stepped(run.id, len(run.replay) // 2)
        return True

    def _snapshot_due(self, lane: Lane) -> bool:
        run = self.ledger.state.runs[lane.run]
        if not lane.resident or run.status != "ready" or run.passes or not run.replay:
            return False
        if lane.queue and lane.queue[0].sent:
            return False
        return self.snapshots.due(lane.run)

    async def _snapshot(self, lane: Lane) -> None:
        """Write the run down, so that replay can start here, and drop what is no longer needed for it."""
        run = self.ledger.state.runs[lane.run]
        if run.passes or not run.replay or run.status != "ready":
            return
        directory = self.snapshots.place(run.id)
        task = Task("snapshot", run.id, OpKind.SAVE_WEIGHTS, {"directory": str(directory), "optimizer": True})
        (outcome,) = await self.engine.step([task])
        if outcome.category:
            log.warning("no snapshot of %s: %s", run.id, outcome.error)
            return
        covered, before = list(run.replay), run.snapshot
        data = {"run": run.id, "directory": str(directory), "covers": covered[-1]}
        try:
            await self.ledger.record("run_snapshot", run.tenant, data)
            await self.ledger.journal.drop_blobs(covered)
        except Overloaded as full:
            log.warning("no snapshot of %s: %s", run.id, full)
            return
        await self.snapshots.keep(run.id, directory, before)

    async def _release_leaving(self) -> None:
        for run in list(self._leaving):
            lane = self.lanes.by_run.get(run)
            if lane is not None and lane.queue:
                continue
            self._leaving.discard(run)
            if lane is not None and lane.resident:
                await self._snapshot(lane)
                await self.engine.step([Task("release", run, OpKind.UNLOAD_MODEL)])
                lane.resident = False


_NOT_BACK = "the state of this run could not be brought back after a restart of its worker"


def _lanes_of(batch: Sequence[Grant]) -> list[Lane]:
    return list({id(grant.lane): grant.lane for grant in batch}.values())


def _too_often(entry: Entry) -> str:
    if entry.attempts >= MAX_ATTEMPTS:
        return "the training worker died twice while running"
    if entry.servers >= MAX_SERVERS:
        return f"the server ended {1 + entry.servers} times while it had to run"
    return ""


async def _nothing() -> list[Outcome]:
    return []


def _task(grant: Grant) -> Task:
    op = grant.entry.op
    body = b"" if grant.entry.sent else op.body
    return Task(op.request_id, op.run, op.kind, op.args, body, op.content_type, grant.tokens)
