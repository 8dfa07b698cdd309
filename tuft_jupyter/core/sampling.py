"""Sampling: weights pinned under an id, and requests that go to the sampling worker at once.

Samples are not journaled: a lost one is answered with :class:`~tuft_jupyter.core.errors.Lost`, and the SDK sends it
again. Each base model has one sampling worker, brought up when first needed; it batches by itself and loads adapters
from the directories that requests name. The module knows no HTTP and does not look into request bodies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.completions import Completions
from tuft_jupyter.core.engine import Catalog, EngineDied, SamplingEngine
from tuft_jupyter.core.errors import NotFound, Overloaded, TuftError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.samples import Kept, Samples
from tuft_jupyter.core.sampling_usage import SamplingUsage
from tuft_jupyter.core.startup import bring_up
from tuft_jupyter.core.state import Checkpoint, Sampler
from tuft_jupyter.core.types import ModelCard, Principal, sampler_id

log = logging.getLogger("tuft_jupyter.sampling")

WAITING = 4096
"""Sample requests a tenant may have under way; more are told to come back, as the SDK does by itself."""

WAITING_BYTES = 256 * 2**20
"""What their bodies may weigh together."""

REMEMBERED = 65_536
"""(sampler, seq) pairs remembered, so that a repeated request is not drawn twice."""


ASK_SECONDS = 1.0
"""How long a worker may take to say what a request waits for."""

CANCELLED = "this sample request was cancelled"


class Worker:
    """One base model's sampling engine with its state of life."""

    def __init__(self, card: ModelCard, engine: SamplingEngine, clock: Callable[[], float]) -> None:
        self.card = card
        self.engine = engine
        self.status = "idle"
        self.detail = ""
        self.used = clock()
        """when it was last asked for something"""
        self._clock = clock
        self._users = 0
        self._starting: asyncio.Task[None] | None = None
        self._stopping = asyncio.Lock()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """For as long as a request is under way."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self.used = self._clock()

    async def ready(self) -> None:
        """Return once the engine is up; many callers share one start."""
        if self.status == "ready":
            return
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        try:
            await asyncio.shield(self._starting)
        finally:
            if self._starting is not None and self._starting.done():
                self._starting = None

    def lost(self) -> None:
        self.status, self.detail = "idle", "restarting the sampling worker"

    async def rest(self) -> None:
        """Let the engine go, unless it has work; the next request starts it again."""
        if self.status != "ready" or self._users:
            return
        async with self._stopping:
            self.status, self.detail = "idle", ""
            await self.engine.stop()
        log.info("the sampling worker of %s ended: nobody used it", self.card.name)

    async def stop(self) -> None:
        """End the engine; a start that is under way is given up without a word."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self.engine.stop()

    async def _start(self) -> None:
        self.status = "loading"
        try:
            async with self._stopping:
                await bring_up(self.engine, f"{self.card.name} for sampling", self._say)
        except TuftError as error:
            self.status, self.detail = "failed", error.message
            raise
        self.status, self.detail = "ready", ""
        self.used = self._clock()

    def _say(self, detail: str) -> None:
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Drawing:
    """A request under way; ``size`` is its body's, in bytes."""

    task: asyncio.Task[None]
    sampler: Sampler
    seq: int
    size: int


class Sampling:
    """The samplers of all tenants and their requests."""

    def __init__(
        self,
        ledger: Ledger,
        catalog: Catalog,
        make_engine: Callable[[ModelCard], SamplingEngine],
        samples: Samples | None = None,
    ) -> None:
        self.ledger = ledger
        self.catalog = catalog
        self.workers: dict[str, Worker] = {}
        self.completions = Completions()
        self.samples = samples or Samples(keeping=False)
        self.usage = SamplingUsage(ledger)
        self._make_engine = make_engine
        self._seen: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._joined: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._drawing: dict[str, _Drawing] = {}
        self._count: Counter[str] = Counter()
        """requests under way, by tenant; those in OpenAI's form too"""
        self._bytes: Counter[str] = Counter()
        """of their bodies, by tenant"""

    @property
    def in_flight(self) -> int:
        """Requests under way, of all tenants and through either API."""
        return self._count.total()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.usage.flush()
        await asyncio.gather(*(worker.stop() for worker in self.workers.values()))

    def worker(self, card: ModelCard) -> Worker:
        worker = self.workers.get(card.name)
        if worker is None:
            worker = self.workers[card.name] = Worker(
                card, self._make_engine(card), lambda: self.ledger.clock()
            )
        return worker

    async def open(
        self,
        principal: Principal,
        session: str,
        number: int,
        card: ModelCard,
        checkpoint: Checkpoint | None,
    ) -> Sampler:
        """Pin a base model, or a checkpoint made on it, under its sampler id; asking again gives the same."""
        name = sampler_id(session, number)
        known = self.ledger.state.samplers.get(name)
        if known is not None:
            return owned(principal, self.ledger.state.samplers, name, "sampler")
        data = {
            "sampler": name,
            "session": session,
            "base_model": card.name,
            "model_path": checkpoint.path if checkpoint else None,
            "directory": checkpoint.directory if checkpoint else None,
        }
        await self.ledger.record("sampler_opened", principal.tenant, data)
        self._spawn(self._warm(card))
        return self.ledger.state.samplers[name]

    def get(self, principal: Principal, sampler: str) -> Sampler:
        return owned(principal, self.ledger.state.samplers, sampler, "sampler")

    async def join(self, principal: Principal, sampler: str) -> int:
        """Number one more client of a sampler; nobody else is given that number, also after a restart."""
        found = self.get(principal, sampler)
        client = max(found.clients, self._joined.get(sampler, 0))
        self._joined[sampler] = client + 1  # before the record is durable: two may ask at once
        await self.ledger.record("sampler_joined", found.tenant, {"sampler": sampler, "client": client})
        return client

    def submit(self, principal: Principal, sampler: str, seq: int, body: bytes) -> str:
        """Send a request on its way; the same (sampler, seq) gives the same request id and is drawn once."""
        found = self.get(principal, sampler)
        known = self._seen.get((sampler, seq))
        if known is not None:
            return known
        if found.directory is not None and not Path(found.directory).is_dir():
            raise NotFound(f"the weights of sampler {sampler!r} are not on disk any more: save them again")
        self._check_room(found.tenant, len(body))
        request_id = secrets.token_hex(16)
        self._seen[sampler, seq] = request_id
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self.ledger.promises.open(request_id, found.tenant, sampler)
        task = self._spawn(self._run(found, seq, request_id, body))
        self._begun(request_id, _Drawing(task, found, seq, len(body)))
        return request_id

    def _check_room(self, tenant: str, size: int) -> None:
        if self._count[tenant] >= WAITING or self._bytes[tenant] + size > WAITING_BYTES:
            raise Overloaded(
                f"{self._count[tenant]} sample requests of yours are under way, the limit of this server is {WAITING} "
                f"(or {WAITING_BYTES >> 20} MiB): wait for results"
            )

    @contextlib.contextmanager
    def room(self, tenant: str, size: int) -> Iterator[None]:
        """One more request of a tenant under way, for as long as it is held; Overloaded if there is no room."""
        self._check_room(tenant, size)
        self._count[tenant] += 1
        self._bytes[tenant] += size
        try:
            yield
        finally:
            self._leave(tenant, size)

    def _begun(self, request_id: str, drawing: _Drawing) -> None:
        self._drawing[request_id] = drawing
        self._count[drawing.sampler.tenant] += 1
        self._bytes[drawing.sampler.tenant] += drawing.size
        drawing.task.add_done_callback(lambda _: self._over(request_id))

    def _over(self, request_id: str) -> None:
        drawing = self._drawing.pop(request_id, None)
        if drawing is None:
            return
        self._leave(drawing.sampler.tenant, drawing.size)

    def _leave(self, tenant: str, size: int) -> None:
        self._count[tenant] -= 1
        self._bytes[tenant] -= size
        if not self._count[tenant]:
            del self._count[tenant], self._bytes[tenant]

    async def cancel(self, principal: Principal, request_id: str) -> None:
        """Stop drawing for a request, which fails; what is no sample of the principal's under way is left alone."""
        self.ledger.promises.get(principal, request_id)
        drawing = self._drawing.get(request_id)
        if drawing is None:
            return
        drawing.task.cancel()
        self._settle(drawing.sampler, drawing.seq, request_id, Answer(category="user", error=CANCELLED))
        worker = self.workers.get(drawing.sampler.base_model)
        if worker is not None:
            with contextlib.suppress(EngineDied):  # nothing draws where there is no worker
                await worker.engine.cancel(request_id)

    async def reason(self, sampler: str, request_id: str) -> str:
        """In words, what a request of a sampler waits for."""
        found = self.ledger.state.samplers.get(sampler)
        worker = self.workers.get(found.base_model) if found else None
        if found is None or worker is None:
            return self._company(found)
        if worker.status != "ready":
            return worker.detail or "the sampling worker is starting"
        held_up = ""
        with contextlib.suppress(EngineDied, TimeoutError):  # then the requests are sent again, or it is busy
            held_up = await asyncio.wait_for(worker.engine.waits_for(request_id), ASK_SECONDS)
        return f"waiting to be drawn: {held_up}" if held_up else self._company(found)

    def _company(self, sampler: Sampler | None) -> str:
        """How many draw together."""
        if sampler is None:
            return "drawing tokens"
        together = [one for one in self._drawing.values() if one.sampler.base_model == sampler.base_model]
        own = sum(one.sampler.tenant == sampler.tenant for one in together)
        return f"drawing tokens: {own} requests of yours among {len(together)} share {sampler.base_model}"

    def forget(self, samplers: Collection[Sampler]) -> None:
        """Keep nothing of samplers that left the record."""
        gone = {sampler.id for sampler in samplers}
        for name in gone:
            self._joined.pop(name, None)
        if gone:
            for key in [key for key in self._seen if key[0] in gone]:
                del self._seen[key]
            self.completions.forget(gone)

    async def _warm(self, card: ModelCard) -> None:
        try:
            await self.worker(card).ready()
        except TuftError as error:
            log.warning("%s cannot sample yet: %s", card.name, error)

    async def _run(self, sampler: Sampler, seq: int, request_id: str, body: bytes) -> None:
        answer = Answer(category="server", error="the sampling worker died twice during this request")
        try:
            worker = self.worker(self.catalog.resolve(sampler.base_model))
            for _ in range(2):
                try:
                    with worker.in_use():
                        await worker.ready()
                        outcome = await worker.engine.sample(
                            request_id, sampler.directory, body, tenant=sampler.tenant
                        )
                except EngineDied as death:
                    log.warning("the sampling worker of %s died: %s", sampler.base_model, death)
                    worker.lost()
                    continue
                if outcome.category:
                    answer = Answer(category=outcome.category, error=outcome.error)
                else:
                    answer = Answer(outcome.result, outcome.content_type)
                    self.samples.keep(sampler, Kept(self.ledger.clock(), body, outcome.result))
                    self.usage.add(sampler.tenant, sampler.session, sampler.base_model, outcome.facts)
                break
        except TuftError as error:
            answer = Answer(category=error.category, error=error.message)
        except Exception as bug:  # the client must get an answer
            log.exception("sampling failed")
            answer = Answer(category="server", error=f"sampling failed: {type(bug).__name__}")
        self._settle(sampler, seq, request_id, answer)

    def _settle(self, sampler: Sampler, seq: int, request_id: str, answer: Answer) -> None:
        self._over(request_id)
        self.ledger.promises.settle(request_id, answer)
        size = None if answer.body is None else len(answer.body)
        self.completions.add(sampler.id, seq, request_id, size)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
