"""The service: one server's sessions, runs, checkpoints and samplers, put together and kept alive.

What a tenant can ask for is in the parts (``sessions``, ``runs``, ``checkpoints``, ``sampling``); here they share one
ledger, the drivers of the base models, recovery at the start and an orderly end. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tuft_jupyter.core.checkpoints import Checkpoints
from tuft_jupyter.core.counters import Counters
from tuft_jupyter.core.driver import Driver
from tuft_jupyter.core.engine import Catalog, Engines
from tuft_jupyter.core.ephemeral import Ephemeral
from tuft_jupyter.core.errors import Overloaded, UserError
from tuft_jupyter.core.history import History
from tuft_jupyter.core.journal import Damaged, ReadOnly, Unavailable
from tuft_jupyter.core.lanes import Lanes
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.lifetimes import Lifetimes
from tuft_jupyter.core.moved import Places
from tuft_jupyter.core.promises import Answer, Promise
from tuft_jupyter.core.quotas import Limits, Quotas
from tuft_jupyter.core.runs import Runs
from tuft_jupyter.core.samples import Samples
from tuft_jupyter.core.sampling import Sampling
from tuft_jupyter.core.sessions import LEAST_SILENCE, Sessions
from tuft_jupyter.core.snapshots import SnapshotRule, Snapshots
from tuft_jupyter.core.state import State
from tuft_jupyter.core.text import Text
from tuft_jupyter.core.types import ModelCard, Op, Principal
from tuft_jupyter.core.watchdog import Watchdog

log = logging.getLogger("tuft_jupyter.service")

SWEEP_SECONDS = 15.0
DRAIN_SECONDS = 8.0
"""How long a stop waits for the steps under way: a Hub gives a server ten seconds."""
SNAPSHOTS = "snapshots"
EPHEMERAL = "ephemeral"
"""Below ``home``: weights that were saved for one sampler, without a name."""


class Service:
    """What one server does. ``home`` holds snapshots and ephemeral sampler weights."""

    def __init__(
        self,
        ledger: Ledger,
        catalog: Catalog,
        engines: Engines,
        home: Path,
        checkpoint_dir: Path,
        limits: Limits | None = None,
        rule: SnapshotRule | None = None,
        quotas: Quotas | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.ledger = ledger
        self.places = Places(checkpoint_dir, home / SNAPSHOTS, home / EPHEMERAL)
        ledger.relocate = self.places.relocate
        self.catalog = catalog
        self.engines = engines
        self.home = home
        self.limits = limits or Limits()
        self.rule = rule or SnapshotRule()
        self.counters = Counters()
        self.drain_seconds = DRAIN_SECONDS
        self.drivers: dict[str, Driver] = {}
        self.quotas = quotas or Quotas()
        self.sessions = Sessions(ledger, self.limits, self.quotas)
        ledger.heard = self._heard
        self.ephemeral = Ephemeral(ledger, self.sessions, self.limits, self.quotas)
        self.history = History(ledger, self.sessions, self.ephemeral, self.limits)
        self.lifetimes = Lifetimes(ledger, self.sessions, self.limits)
        self.checkpoints = Checkpoints(ledger, checkpoint_dir, self.sessions.over, self.quotas)
        self.runs = Runs(
            ledger,
            self.sessions,
            self.checkpoints,
            self.driver,
            self.card,
            home / EPHEMERAL,
            self.ephemeral,
            self.limits,
            self.quotas,
            self.lifetimes,
        )
        self.sampling = Sampling(ledger, catalog, engines.sampling, samples)
        self.text = Text(self.sampling, self.checkpoints)
        self._waiting: list[tuple[int, Op]] = []
        """accepted before the start, of base models that are not on offer now; by the record that accepted each"""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        return self.ledger.state

    # ---- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the journal and queue again what was accepted but has no outcome.

        Unavailable, with nothing begun, if the journal cannot be read now; then it may be tried again.
        """
        try:
            await self.ledger.open()
            self.places.settle(self.ledger.state)
            waiting = [(n, await self._accepted(n)) for n in sorted(self.ledger.state.accepted.values())]
        except BaseException as error:
            await self.ledger.close()
            if isinstance(error, Overloaded):
                raise Unavailable(f"the journal cannot be read now: {error.message}") from error
            raise
        self._waiting = [(n, op) for n, op in waiting if op is not None]
        for base_model in {self.ledger.state.runs[op.run].base_model for _, op in self._waiting}:
            try:
                self.driver(base_model)
            except UserError as error:
                log.warning("requests that were accepted wait: %s", error.message)
        self._spawn(self._maintain(), "maintenance")

    async def _accepted(self, n: int) -> Op | None:
        """What record ``n`` accepted; if its body rotted on disk, it fails alone, and there is none."""
        try:
            return await self.ledger.op(n)
        except Damaged as damage:
            if damage.record is None:
                raise
            told = {name: damage.record.data[name] for name in ("request_id", "run", "seq", "op")}
            error = f"this request was not finished and cannot be run again: {damage.message}. Send it anew"
            log.error("%s of %s: %s", told["op"], told["run"], error)
            told |= {"category": "server", "error": error}
            with contextlib.suppress(ReadOnly):  # then nothing else is recorded either
                await self.ledger.record("op_failed", damage.record.tenant, told)
            return None

    async def stop(self) -> None:
        """Finish the steps under way, leave a snapshot of every run, end the workers, close the journal.

        What is queued stays in the journal, and is run by the next server.
        """
        busy = [driver for driver in self.drivers.values() if driver.status == "ready"]
        for driver in busy:
            driver.close()
        steps = [task for task in self._tasks if task.get_name() in {f"driver {d.card.name}" for d in busy}]
        if steps:
            await asyncio.wait(steps, timeout=self.drain_seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(driver.stop() for driver in self.drivers.values()), self.sampling.stop())
        await self.ledger.close()

    def driver(self, base_model: str) -> Driver:
        """The driver of a base model, set up when first asked for (the worker comes with the first op).

        What was accepted before a restart is queued in it first: nothing that comes later may overtake it.
        """
        card = self.catalog.resolve(base_model)
        driver = self.drivers.get(card.name)
        if driver is None:
            lanes = Lanes(
                self.limits.batch_tokens, self.limits.shared_batch_tokens, weight=self.quotas.weight
            )
            engine = Watchdog(self.engines.training(card), card.max_context_length)
            driver = Driver(card, engine, lanes, self.ledger, self._snapshots())
            self.drivers[card.name] = driver
            mine = [one for one in self._waiting if self.state.runs[one[1].run].base_model == card.name]
            self._waiting = [one for one in self._waiting if one not in mine]
            for n, op in mine:
                entry = lanes.push(op, n)
                entry.left_over, entry.servers = True, self.state.begun_again.get(op.request_id, 0)
            self._spawn(driver.run(), f"driver {card.name}")
        return driver

    def _snapshots(self) -> Snapshots:
        return Snapshots(self.home / SNAPSHOTS, self.rule, self.ledger.clock)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _maintain(self) -> None:
        """Once in a while: drop expired checkpoints, and let idle adapters leave the workers."""
        while True:
            began, tick = self.ledger.clock(), self._tick()
            await asyncio.sleep(tick)
            if self.ledger.clock() - began > tick + LEAST_SILENCE:
                self.sessions.listen_again()  # this process was stopped: it heard nobody, whoever was there
            try:
                await self.sweep(self.ledger.clock())
            except Exception:
                log.exception("maintenance failed; it is tried again")

    def _tick(self) -> float:
        """Seconds between two looks, as the shortest limit asks."""
        spans = [span for span in (self.limits.idle_timeout, self.limits.max_lifetime) if span]
        return min([SWEEP_SECONDS, *(max(span / 4, 0.25) for span in spans)])

    async def sweep(self, now: float) -> None:
        if (
            not self.ledger.journal.problem
        ):  # else nothing is recorded, and the files may be another server's by now
            await self._clear_away(now)
        for driver in self.drivers.values():
            for lane in list(driver.lanes.by_run.values()):
                run = self.ledger.state.runs.get(lane.run)
                if run is not None and lane.resident and not lane.queue and self.lifetimes.idle(run, now):
                    driver.release(run.id)
        await self._rest_idle(now)

    async def _clear_away(self, now: float) -> None:
        """End what is over, on record and on disk."""
        await self.checkpoints.expire(now)
        await self.runs.close_over(now)
        await self.checkpoints.collect()
        for root in (self.places.checkpoints, self.places.ephemeral):
            await self.checkpoints.clear(root)
        await self.sampling.usage.flush()
        await asyncio.to_thread(_remove, self.home / EPHEMERAL, self.ephemeral.spent(now))
        runs, samplers = await self.history.forget(now)
        for gone in runs:  # where a crash came between their end and the removal of their files
            await self._snapshots().remove(gone.id, gone.snapshot)
        self.sampling.forget(samplers)
        await self.ledger.tidy()
        for driver in self.drivers.values():
            await driver.forget_idle()

    async def _rest_idle(self, now: float) -> None:
        """End workers that nobody used for as long as an idle adapter stays: what they hold of a GPU is free then."""
        for driver in self.drivers.values():
            if now - driver.used > self.limits.idle_timeout:
                driver.rest()
        for name, worker in self.sampling.workers.items():
            opened = (s.session for s in self.ledger.state.samplers.values() if s.base_model == name)
            used = max([worker.used, *map(self.sessions.last_seen, opened)])
            if now - used > self.limits.idle_timeout:
                await worker.rest()

    # ---- models -----------------------------------------------------------------------------------------------

    async def card(self, principal: Principal, name: str) -> ModelCard:
        """The base model a request names. Whoever owns the server may name any model on its machine."""
        try:
            return self.catalog.resolve(name)
        except UserError:
            if not principal.admin:
                raise
            return await self.offer(principal, name)

    async def offer(self, principal: Principal, name: str) -> ModelCard:
        """Add a base model to those on offer, for good."""
        card = self.catalog.find(name)
        if card.name not in {known.name for known in self.catalog.cards()}:
            data = {"name": card.name, "path": card.path}
            await self.ledger.record("model_offered", principal.tenant, data)
        return self.catalog.resolve(card.name)

    # ---- sessions ---------------------------------------------------------------------------------------------

    async def finish_session(
        self, principal: Principal, session: str, reason: str, detail: str | None
    ) -> None:
        """End a session; its runs stay on record and leave the workers."""
        found = self.sessions.get(principal, session)
        await self.sessions.finish(found, reason, detail)
        for run in list(self.ledger.state.runs.values()):
            driver = self.drivers.get(run.base_model)
            if run.session == session and driver is not None:
                driver.release(run.id)

    # ---- answers ----------------------------------------------------------------------------------------------

    async def retrieve(self, principal: Principal, request_id: str, seconds: float) -> Answer | None:
        """The answer to a promise, waiting up to that many seconds; None if it is not there yet."""
        promise = self.ledger.promises.get(principal, request_id)
        answer = await self.ledger.promises.wait(promise, seconds)
        if answer is None:
            return None
        promise.fetched = promise.fetched or self.ledger.clock()
        return await self.ledger.answer(answer)

    def _heard(self, owner: str) -> float:
        """When the client of a run or sampler was last heard of."""
        run = self.state.runs.get(owner)
        found = run or self.state.samplers.get(owner)
        if found is None:
            return math.inf
        return max(self.sessions.last_seen(found.session), run.last_request if run else 0.0)

    def answered(self, principal: Principal, owner: str, body: bytes) -> str:
        """A promise that is kept already: its request id, for clients that ask for every answer by one."""
        request_id = secrets.token_hex(16)
        self.ledger.promises.open(request_id, principal.tenant, owner)
        self.ledger.promises.settle(request_id, Answer(body))
        return request_id

    def queue_state(self, principal: Principal) -> str:
        """In the protocol's words, whether something else than work in progress holds a tenant's requests up."""
        return "paused_rate_limit" if self.quotas.paused(principal.tenant) else "active"

    async def queue_reason(self, principal: Principal, request_id: str) -> str:
        """In words, what a promise waits for."""
        promise: Promise = self.ledger.promises.get(principal, request_id)
        run = self.ledger.state.runs.get(promise.owner)
        driver = self.drivers.get(run.base_model) if run is not None else None
        if run is None:
            return await self.sampling.reason(promise.owner, request_id)
        if driver is None:
            return f"{run.base_model} is not on offer here any more: it goes on when the server's owner adds it again"
        if driver.status != "ready":
            return driver.detail or "the training worker is starting"
        ahead, busy = driver.lanes.position(run.id, request_id)
        return f"{ahead} requests of this run come first; {busy} runs share the engine"


def _remove(root: Path, spent: set[str]) -> None:
    for directory in root.iterdir() if root.is_dir() else ():
        if str(directory) in spent:
            shutil.rmtree(directory, ignore_errors=True)
