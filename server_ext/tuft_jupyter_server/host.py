"""The host: one server's service with its keys, models and workers, free of any web framework's application object.

The Jupyter extension and the daemon both build one from :class:`~tuft_jupyter.config.Settings`. It picks the journal,
offers the models, makes engines when they are needed, and says what the server is waiting for. Ray is imported with the
first worker, never before.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import importlib.util
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tuft_jupyter import models, tracing
from tuft_jupyter._version import __version__
from tuft_jupyter.config import BackendsConfig, Settings
from tuft_jupyter.config.reader import usable
from tuft_jupyter.config.sections import Served
from tuft_jupyter.core.access import KeyRing
from tuft_jupyter.core.driver import Driver
from tuft_jupyter.core.engine import Engines, RunMemory, SamplingEngine, TrainingEngine
from tuft_jupyter.core.errors import Elsewhere, Forbidden, Overloaded, TuftError, UserError
from tuft_jupyter.core.journal import Journal, MemoryJournal, Unavailable
from tuft_jupyter.core.journal_redis import RedisJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.keys import KeyBook
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Limits, Queue, Quota, Quotas, Work
from tuft_jupyter.core.samples import Samples
from tuft_jupyter.core.sampling import Worker
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.types import ModelCard, Principal
from tuft_jupyter.engine.remote.engines import BackendEngines
from tuft_jupyter.home import ensure_key, ensure_secret, private_directory, private_file
from tuft_jupyter.kernel.versions import sdk_note
from tuft_jupyter.wire.api import Api
from tuft_jupyter.wire.tickets import Tickets
from tuft_jupyter_server import foreseen, live
from tuft_jupyter_server.catalog import ServerCatalog
from tuft_jupyter_server.detokenize import detokenizer
from tuft_jupyter_server.gauges import STARTED, Gauges
from tuft_jupyter_server.metrics import CONTENT_TYPE, Metrics
from tuft_jupyter_server.traces import Traces

log = logging.getLogger("tuft_jupyter")

BACKEND = ("torch", "transformers", "peft", "ray", "safetensors")
TAKE_OVER_SECONDS = 1.0
"""Between two tries to take over a journal that another server holds."""
NO_BACKEND = (
    "no training backend is installed in the server's environment (missing: {missing}): run "
    'pip install "tuft-jupyter[backend]" there and restart the server'
)
EXPIRY_SECONDS = 0.5
"""How late a key's end may be noticed by a request that is parked."""


def missing_backend() -> list[str]:
    """The packages of the ``backend`` extra that this environment lacks (found without importing them)."""
    return [name for name in BACKEND if importlib.util.find_spec(name) is None]


def owner_name() -> str:
    """Who owns a single-user server: the Hub user, else the account's user."""
    name = os.environ.get("JUPYTERHUB_USER")
    if name:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container user without an account
        return "local"


class LazyRayEngines:
    """Workers of ours on Ray, which is imported with the first; without the backend extra, a refusal that says how to
    install it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._engines: Any = None

    def training(self, card: ModelCard) -> TrainingEngine:
        return self._made().training(card)

    def sampling(self, card: ModelCard) -> SamplingEngine:
        return self._made().sampling(card)

    def workers(self) -> list[tuple[str, int]]:
        """(name, pid) of the worker processes on this machine."""
        return [] if self._engines is None else self._engines.workers()

    async def memory(self) -> dict[str, RunMemory]:
        """What each run in training takes in memory."""
        return {} if self._engines is None else await self._engines.memory()

    def placements(self) -> list[dict[str, Any]]:
        """What is reserved for each base model."""
        return [] if self._engines is None else self._engines.placements()

    async def ray(self) -> dict[str, Any]:
        """The Ray that is up, and what is placed where."""
        if self._engines is None:
            return {"address": None, "why": None, "nodes": [], "placements": []}
        found: dict[str, Any] = await self._engines.ray()
        return found

    def _made(self) -> Any:
        if self._engines is None:
            missing = missing_backend()
            if missing:
                raise UserError(NO_BACKEND.format(missing=", ".join(missing)))
            from tuft_jupyter.engine import ray_engines

            self._engines = ray_engines.RayEngines(self.settings)
        return self._engines


class Host:
    """``owner`` is the principal of the server's own key and of everybody who may use its lab.

    ``engines`` makes workers of ours: on Ray unless given. ``keys`` decides who is let in, and ``groups`` says which
    groups a tenant is in, where a Hub knows.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Any = None,
        *,
        owner: Principal | None = None,
        keys: KeyRing | None = None,
        groups: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.settings = settings
        for note in settings.notes:
            log.warning("%s", note)
        if settings.toy_backend_seed:
            log.info("toy_backend_seed is read and has no effect: there is no toy engine here")
        self.owner = owner or Principal(owner_name(), admin=True)
        self.key = os.environ.get("TUFT_API_KEY") or ensure_key(settings.home)
        self.tickets = Tickets(ensure_secret(settings.home))
        with usable("checkpoint_dir", settings.checkpoint_dir):
            private_directory(settings.checkpoint_dir)
        self.groups = {} if groups is None else groups
        self.journal = open_journal(settings)
        self.ledger = Ledger(self.journal, result_seconds=settings.persistence.future_ttl_seconds)
        self.keys = keys or KeyRing()
        self.keys.token, self.keys.clock = self.tickets.credential, lambda: self.ledger.clock()
        given = {key: Principal(tenant) for key, tenant in settings.authorized_users.items()}
        self.keybook = KeyBook(self.ledger, self.keys, (self.key, self.owner), given)
        traced = tracing.begin("server")
        self.traces = None if traced is None else Traces(traced, self.ledger)
        self.engines = engines or LazyRayEngines(settings)
        self.elsewhere = BackendEngines(settings, self.engines)
        serving: Engines = self.engines if settings.backends == BackendsConfig() else self.elsewhere
        if self.traces is not None:
            serving = self.traces.around(serving)
        self.service = Service(
            self.ledger,
            ServerCatalog(settings, self.ledger),
            serving,
            settings.home,
            settings.checkpoint_dir,
            Limits(
                max_rank=settings.max_lora_rank,
                idle_timeout=settings.adapter_timeout,
                max_lifetime=settings.adapter_max_lifetime,
                owner=self.owner.tenant,
                history=settings.history_days * 86400,
                custom_loss=settings.custom_loss_server_side,
            ),
            quotas=_quotas(settings, lambda tenant: self.groups.get(tenant, ())),
            samples=Samples(settings.keep_samples),
        )
        watch = None if self.traces is None else self.traces.request
        self.api = Api(self.service, self, watch=watch, max_ongoing=settings.max_ongoing_requests)
        self.gauges = Gauges(self.engines.workers, self.engines.memory)
        self._metrics = Metrics(self)
        self.problem = ""
        self._ready = asyncio.Event()
        self._tried = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def answers_at(self, address: str) -> None:
        """Say, before the start, where clients reach this server: another one of its namespace sends them here."""
        self.journal.address = address

    async def start(self) -> None:
        """Recover from the journal. A failure is kept in ``problem`` and shown; the notebook server goes on.

        A journal that another server holds is taken over as soon as that one lets go. Servers elsewhere need not be
        there yet.
        """
        if self.settings.cuda_visible_devices:  # what Ray, our gauges and the kernels that start now go by
            os.environ["CUDA_VISIBLE_DEVICES"] = self.settings.cuda_visible_devices
        if self.elsewhere.servers:
            self._tasks.append(
                asyncio.get_running_loop().create_task(self.elsewhere.watch(self._there_again))
            )
        if await self._try_to_start():
            self._tasks.append(asyncio.get_running_loop().create_task(self._wait_for_the_journal()))

    async def _try_to_start(self) -> bool:
        """True if it is worth trying again."""
        try:
            await self.service.start()
        except Exception as error:  # whatever it is, nobody is told for ever that the journal is read
            known = isinstance(error, TuftError)
            problem = str(error) if known else f"it could not start ({type(error).__name__}: {error})"
            if self.problem != problem:
                self.problem = problem
                log.error("tuft-jupyter is not serving: %s", problem, exc_info=not known)
            self._tried.set()
            return isinstance(error, Unavailable)
        self.problem = ""
        self.keybook.recovered()
        told = foreseen.warn(
            self.settings, self.service.catalog, self.ledger.state, workers=self.elsewhere.needs_workers
        )
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._expire_keys()))
        self._tasks.append(loop.create_task(told, name="foreseen"))
        self._ready.set()
        self._tried.set()
        log.info("tuft-jupyter keeps its journal in %s", self.journal.description)
        return False

    async def recovered(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._tried.wait()
        if self.journal.elsewhere:
            message = f"{self.problem or self.journal.problem} (it answers at {self.journal.elsewhere})"
            raise Elsewhere(message, self.journal.elsewhere)
        if not self._ready.is_set():
            raise Overloaded(f"not ready yet: {self.problem or 'reading the journal'}", retry_after=2.0)

    async def _wait_for_the_journal(self) -> None:
        while True:
            await asyncio.sleep(TAKE_OVER_SECONDS)
            if not await self._try_to_start():
                return

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.service.stop()
        await self.elsewhere.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.tracing.close)

    async def _expire_keys(self) -> None:
        while True:
            self.keys.expire()
            asked = time.perf_counter()
            await asyncio.sleep(EXPIRY_SECONDS)
            self._metrics.lag.observe(max(time.perf_counter() - asked - EXPIRY_SECONDS, 0.0))

    @property
    def serving(self) -> bool:
        return self._ready.is_set() and not self.problem

    @property
    def public_root(self) -> str:
        return self.settings.public_url.rstrip("/") + "/api/v1" if self.settings.public_url else ""

    def metrics(self) -> tuple[bytes, str]:
        return self._metrics.text(), CONTENT_TYPE

    def status(self, principal: Principal) -> dict[str, Any]:
        missing = missing_backend() if self.elsewhere.needs_workers else []
        states = [self._model_state(card) for card in self.service.catalog.cards()]
        loading = [f"{s['name']}: {s['detail']}" for s in states if s["state"] == "loading"]
        problem = self.problem or self.journal.problem
        waiting = problem or "; ".join(loading)
        if not self._ready.is_set() and not waiting:
            waiting = "reading the journal"
        backend = NO_BACKEND.format(missing=", ".join(missing)) if missing else self.elsewhere.description
        note = sdk_note(self._sdk_of(principal.tenant))
        return {
            "version": __version__,
            "started": STARTED,
            "tenant": principal.tenant,
            "admin": principal.admin,
            "ready": self._ready.is_set() and not loading and not problem,
            "waiting_for": waiting or None,
            "problem": problem or None,
            "persistence": self.journal.description,
            "durability": self.journal.durability.value,
            "backend": {"installed": not missing, "detail": backend},
            "models": states,
            "placements": self._placements(principal),
            "applications": [self._application(app, states) for app in self.settings.applications],
            "servers": [server.shown() for server in self.elsewhere.servers],
            "notes": [text for text in (note, *(server.detail for server in self.elsewhere.servers)) if text],
            "ending": self.service.lifetimes.ending(principal.tenant, self.ledger.clock()),
        }

    def _there_again(self) -> None:
        """A server elsewhere is back: what failed for want of it is tried again when it is next asked for."""
        parts: list[Driver | Worker] = [
            *self.service.drivers.values(),
            *self.service.sampling.workers.values(),
        ]
        for part in parts:
            if part.status == "failed":
                part.status, part.detail = "idle", ""

    def _application(self, app: Served, models: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        state = next((each["state"] for each in models if each["name"] == app.model), "")
        return {**asdict(app), "state": state or ("ready" if self.serving else "starting")}

    def _sdk_of(self, tenant: str) -> str:
        """The SDK of a tenant's newest session, as it named itself."""
        sessions = reversed(self.ledger.state.sessions.values())
        return next((each.sdk_version for each in sessions if each.tenant == tenant), "")

    async def add_model(self, principal: Principal, model: str) -> ModelCard:
        if not principal.admin:
            raise Forbidden("only the owner of this server may add base models: ask for one that is on offer")
        card = await self.service.card(principal, model)
        self.service.driver(card.name).wake()
        return card

    def live(
        self, principal: Principal, tenant: str | None, since: int | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        return live.messages(self, principal, tenant, since)

    async def measured(self) -> dict[str, Any]:
        return await self.gauges.fresh()

    def _placements(self, principal: Principal) -> list[dict[str, Any]]:
        """The mesh of each model that has GPUs of its own; on which nodes, only admins are told."""
        hidden = set() if principal.admin else {"processes"}
        return [
            {key: value for key, value in placed.items() if key not in hidden}
            for placed in self.engines.placements()
        ]

    async def ray(self) -> dict[str, Any]:
        from tuft_jupyter.engine import ray_place

        return {**await self.engines.ray(), "commands": ray_place.start_commands()}

    def tokenizer(self, card: ModelCard) -> dict[str, str]:
        return {path.name: path.read_text(encoding="utf-8") for path in models.tokenizer_files(card)}

    def words(self, card: ModelCard) -> Callable[[Sequence[int]], str | None]:
        return detokenizer(card)

    def _model_state(self, card: ModelCard) -> dict[str, str]:
        driver = self.service.drivers.get(card.name)
        worker = self.service.sampling.workers.get(card.name)
        parts = [part for part in (driver, worker) if part is not None]
        for status in ("failed", "loading", "ready"):
            for part in parts:
                if part.status == status:
                    return {"name": card.name, "state": status, "detail": part.detail}
        return {"name": card.name, "state": "idle", "detail": ""}


def _quotas(settings: Settings, members: Callable[[str], Collection[str]]) -> Quotas:
    default = Quota(
        runs=settings.per_token_model_limit,
        requests_per_second=settings.rps_limit,
        tokens_per_second=settings.tps_limit,
        input_tokens=settings.max_input_tokens,
        checkpoint_bytes=settings.max_checkpoint_bytes,
        sessions=settings.max_sessions,
        samplers=settings.max_samplers,
    )
    tenants = {each.tenant: each.given() for each in settings.tenants if each.tenant}
    groups = {each.group: each.given() for each in settings.tenants if each.group}
    queues = {
        (work, model.model_name): Queue(given.rps_limit, given.tps_limit, given.max_input_tokens)
        for model in settings.supported_models
        for work, given in ((Work.TRAINING, model.training_queue), (Work.SAMPLING, model.sampling_queue))
    }
    return Quotas(default, tenants, groups, settings.max_loras, members, queues)


def open_journal(settings: Settings) -> Journal:
    """The journal that the settings name, not yet taken over."""
    kept = settings.persistence
    if kept.mode == "disabled":
        return MemoryJournal()
    if kept.mode == "file_redis":
        with usable("persistence.file_path", kept.file_path):
            private_directory(kept.file_path.parent)
            return SqliteJournal(private_file(kept.file_path))
    return RedisJournal(kept.redis_url, kept.namespace, settings.home / "redis", kept.future_ttl_seconds)
