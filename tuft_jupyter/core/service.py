"""The service: everything a tenant can ask for, over core values, without HTTP.

Each verb checks ownership first, then the request, then records it; an op goes into its lane and is answered later
through its promise. Refused requests change nothing. Sampling has its own half in :mod:`~tuft_jupyter.core.sampling`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.driver import Driver, SnapshotRule
from tuft_jupyter.core.engine import SamplingEngine, TrainingEngine
from tuft_jupyter.core.errors import NotFound, Overloaded, UserError
from tuft_jupyter.core.lanes import Lanes
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer, Promise
from tuft_jupyter.core.sampling import Sampling
from tuft_jupyter.core.state import Checkpoint, Run, Session
from tuft_jupyter.core.types import (
    JSON,
    AdamParams,
    CheckpointKind,
    LoraSpec,
    ModelCard,
    Op,
    OpKind,
    Principal,
    checkpoint_path,
    run_id,
    sampler_id,
)

log = logging.getLogger("tuft_jupyter.service")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
CHECKPOINT = re.compile(
    r"tinker://(?P<run>[^/]{1,200})/(?P<kind>weights|sampler_weights)/(?P<name>[^/]{1,128})\Z"
)


class Catalog(Protocol):
    """The base models this server offers."""

    def cards(self) -> list[ModelCard]:
        """The models offered, in the order of the configuration."""

    def resolve(self, name: str) -> ModelCard:
        """The card of an offered model by name or path; UserError names what is offered."""

    def find(self, name: str) -> ModelCard:
        """The card of any model on this machine, offered or not; UserError says what was looked for."""


class Engines(Protocol):
    """Makes the engines of a base model (not started yet)."""

    def training(self, card: ModelCard) -> TrainingEngine: ...

    def sampling(self, card: ModelCard) -> SamplingEngine: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants. Tokens count model input tokens; times are seconds."""

    max_rank: int = 64
    queued_ops_per_tenant: int = 4096
    batch_tokens: int = 512
    shared_batch_tokens: int = 256
    idle_timeout: float = 1800.0
    session_timeout: float = 120.0


class Service:
    """One server's verbs. ``home`` holds checkpoints, snapshots and ephemeral sampler weights."""

    def __init__(
        self,
        ledger: Ledger,
        catalog: Catalog,
        engines: Engines,
        home: Path,
        checkpoint_dir: Path,
        limits: Limits | None = None,
        rule: SnapshotRule | None = None,
    ) -> None:
        self.ledger = ledger
        self.catalog = catalog
        self.engines = engines
        self.home = home
        self.checkpoint_dir = checkpoint_dir
        self.limits = limits or Limits()
        self.rule = rule or SnapshotRule()
        self.drivers: dict[str, Driver] = {}
        self.heartbeats: dict[str, float] = {}
        self.sampling = Sampling(ledger, catalog, engines.sampling)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> Any:
        return self.ledger.state

    # ---- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the journal and queue again what was accepted but has no outcome."""
        await self.ledger.open()
        for n, (run, seq, digest, request_id) in self.ledger.accepted.items():
            owner = self.ledger.state.runs.get(run)
            if owner is not None:
                lanes = self._lanes_of(owner)
                if lanes is not None:
                    lanes.remember(run, owner.tenant, seq, digest, request_id)
        for n in sorted(self.ledger.state.accepted.values()):
            op = await self.ledger.op(n)
            lanes = self._lanes_of(self.ledger.state.runs[op.run])
            if lanes is not None:
                lanes.push(op, n)
        self._spawn(self._maintain(), "maintenance")

    async def stop(self) -> None:
        """Stop taking work, leave a snapshot of every run, end the workers, close the journal."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(driver.stop() for driver in self.drivers.values()), self.sampling.stop())
        await self.ledger.close()

    def driver(self, card: ModelCard) -> Driver:
        """The driver of a base model, set up when first asked for (the worker comes with the first op)."""
        driver = self.drivers.get(card.name)
        if driver is None:
            lanes = Lanes(self.limits.batch_tokens, self.limits.shared_batch_tokens)
            engine = self.engines.training(card)
            snapshots = self.home / "snapshots"
            driver = Driver(card, engine, lanes, self.ledger, snapshots, self.rule)
            self.drivers[card.name] = driver
            self._spawn(driver.run(), f"driver {card.name}")
        return driver

    def _lanes_of(self, run: Run) -> Lanes | None:
        try:
            return self.driver(self.catalog.resolve(run.base_model)).lanes
        except UserError as error:
            log.warning("run %s waits: %s", run.id, error)
            return None

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _maintain(self) -> None:
        """Once in a while: drop expired checkpoints, and let idle adapters leave the workers."""
        while True:
            await asyncio.sleep(15.0)
            try:
                await self.sweep(self.ledger.clock())
            except Exception:
                log.exception("maintenance failed; it is tried again")

    async def sweep(self, now: float) -> None:
        for checkpoint in list(self.ledger.state.checkpoints.values()):
            if checkpoint.expires is not None and checkpoint.expires <= now:
                await self._delete(checkpoint)
        for driver in self.drivers.values():
            for lane in list(driver.lanes.by_run.values()):
                run = self.ledger.state.runs.get(lane.run)
                if run is None or not lane.resident or lane.queue:
                    continue
                seen = max(run.last_request, self.heartbeats.get(run.session, 0.0))
                if now - seen > self.limits.idle_timeout:
                    driver.release(run.id)

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

    async def open_session(self, principal: Principal, details: Mapping[str, Any]) -> str:
        session = str(uuid.uuid4())
        await self.ledger.record("session_opened", principal.tenant, {"session": session, **details})
        self.heartbeats[session] = self.ledger.clock()
        return session

    def session(self, principal: Principal, session: str) -> Session:
        return owned(principal, self.ledger.state.sessions, session, "session")

    def live_session(self, principal: Principal, session: str) -> Session:
        found = self.session(principal, session)
        if found.finished is not None:
            raise UserError(f"session {session!r} is finished ({found.finished}): open a new ServiceClient")
        return found

    def heartbeat(self, principal: Principal, session: str) -> None:
        self.heartbeats[self.session(principal, session).id] = self.ledger.clock()

    async def finish_session(
        self, principal: Principal, session: str, reason: str, detail: str | None
    ) -> None:
        """End a session: the first reason wins; its runs stay on record and leave the workers."""
        found = self.session(principal, session)
        if found.finished is not None:
            return
        data = {"session": session, "reason": reason, "detail": detail}
        await self.ledger.record("session_finished", found.tenant, data)
        for run in list(self.ledger.state.runs.values()):
            driver = self.drivers.get(run.base_model)
            if run.session == session and driver is not None:
                driver.release(run.id)

    # ---- ops --------------------------------------------------------------------------------------------------

    def run(self, principal: Principal, run: str) -> Run:
        return owned(principal, self.ledger.state.runs, run, "model")

    async def create_model(
        self,
        principal: Principal,
        session: str,
        number: int,
        base_model: str,
        lora: Mapping[str, Any],
        user_metadata: Mapping[str, str],
        raw: bytes,
    ) -> str:
        """Accept a new run with a fresh adapter; ``lora`` may leave ``seed`` out. Returns the request id."""
        found = self.live_session(principal, session)
        card = await self.card(principal, base_model)
        spec = self._lora(lora)
        args = {
            "session": found.id,
            "base_model": card.name,
            "lora": asdict(spec),
            "user_metadata": dict(user_metadata),
        }
        return await self._submit(
            found.tenant, card, OpKind.CREATE_MODEL, run_id(session, number), 0, args, raw
        )

    async def load_new_model(
        self,
        principal: Principal,
        session: str,
        number: int,
        path: str,
        optimizer: bool,
        user_metadata: Mapping[str, str],
        raw: bytes,
    ) -> str:
        """Accept a new run that starts from a checkpoint (create-via-load)."""
        found = self.live_session(principal, session)
        source = self.readable_checkpoint(principal, path)
        card = self.catalog.resolve(source.base_model)
        args = {
            "session": found.id,
            "base_model": card.name,
            "lora": dict(source.lora),
            "user_metadata": dict(user_metadata),
            "facts": {"step": source.step if optimizer else 0},
            **self._load_args(source, optimizer),
        }
        return await self._submit(
            found.tenant, card, OpKind.LOAD_WEIGHTS, run_id(session, number), 0, args, raw
        )

    async def load_weights(
        self, principal: Principal, run: str, seq: int, path: str, optimizer: bool, raw: bytes
    ) -> str:
        """Accept the replacing of a run's adapter by a checkpoint's."""
        found = self.live_run(principal, run)
        source = self.readable_checkpoint(principal, path)
        if source.base_model != found.base_model:
            raise UserError(
                f"path: {path} was trained on {source.base_model}, this model on {found.base_model}: "
                f"create a training client from the checkpoint instead"
            )
        args = {**self._load_args(source, optimizer), "facts": {"step": source.step if optimizer else 0}}
        return await self._accept(found, OpKind.LOAD_WEIGHTS, seq, args, raw)

    async def forward_backward(
        self,
        principal: Principal,
        run: str,
        seq: int,
        tokens: int,
        body: bytes,
        content_type: str,
        *,
        backward: bool,
    ) -> str:
        found = self.live_run(principal, run)
        kind = OpKind.FORWARD_BACKWARD if backward else OpKind.FORWARD
        return await self._accept(
            found, kind, seq, {}, body, tokens=tokens, body=body, content_type=content_type
        )

    async def optim_step(self, principal: Principal, run: str, seq: int, adam: AdamParams, raw: bytes) -> str:
        found = self.live_run(principal, run)
        return await self._accept(found, OpKind.OPTIM_STEP, seq, {"adam": asdict(adam)}, raw)

    async def save_weights(
        self,
        principal: Principal,
        run: str,
        seq: int,
        name: str,
        kind: CheckpointKind,
        raw: bytes,
        *,
        ttl: float | None = None,
        overwrite: bool = True,
        user_metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Accept the saving of a run: with its optimizer as a training checkpoint, without as a sampler's."""
        found = self.live_run(principal, run)
        if not NAME.match(name):
            raise UserError(
                f"path: {name!r} is not a checkpoint name: use 1 to 128 letters, digits, '.', '_' or '-', "
                "beginning with a letter or digit"
            )
        path = checkpoint_path(run, kind, name)
        if not overwrite and path in self.ledger.state.checkpoints:
            raise UserError(f"path: {path} exists already: choose another name, or save with overwrite=True")
        training = kind is CheckpointKind.TRAINING
        directory = str(self.checkpoint_dir / uuid.uuid4().hex)
        saved = {
            "path": path,
            "kind": kind.value,
            "name": name,
            "directory": directory,
            "expires": None if ttl is None else self.ledger.clock() + ttl,
            "user_metadata": dict(user_metadata or {}),
        }
        args = {"directory": directory, "optimizer": training, "path": path, "facts": {"checkpoint": saved}}
        op = OpKind.SAVE_WEIGHTS if training else OpKind.SAVE_WEIGHTS_FOR_SAMPLER
        return await self._accept(found, op, seq, args, raw)

    async def save_for_sampling_session(
        self, principal: Principal, run: str, seq: int, number: int, raw: bytes
    ) -> str:
        """Accept an ephemeral save: the weights become a sampler at once, without a checkpoint."""
        found = self.live_run(principal, run)
        directory = str(self.home / "ephemeral" / uuid.uuid4().hex)
        sampler = sampler_id(found.session, number)
        opened = {
            "sampler": sampler,
            "session": found.session,
            "base_model": found.base_model,
            "model_path": None,
            "directory": directory,
        }
        args = {"directory": directory, "sampling_session_id": sampler, "facts": {"sampler": opened}}
        return await self._accept(found, OpKind.SAVE_WEIGHTS_FOR_SAMPLER, seq, args, raw)

    async def unload(self, principal: Principal, run: str, raw: bytes) -> str:
        found = self.live_run(principal, run)
        return await self._accept(found, OpKind.UNLOAD_MODEL, -1, {}, raw)

    def live_run(self, principal: Principal, run: str) -> Run:
        found = self.run(principal, run)
        if found.status in ("failed", "closed"):
            why = found.error or "it was unloaded"
            raise UserError(f"model {run!r} cannot be used any more: {why}")
        self.live_session(principal, found.session)
        return found

    def _lora(self, lora: Mapping[str, Any]) -> LoraSpec:
        rank = lora["rank"]
        if not 1 <= rank <= self.limits.max_rank:
            raise UserError(
                f"lora_config.rank: {rank} is outside 1..{self.limits.max_rank}, the limit of this server "
                "(max_lora_rank): choose a smaller rank"
            )
        seed = lora.get("seed")
        flags = {name: bool(lora.get(name, True)) for name in ("train_attn", "train_mlp", "train_unembed")}
        if not any(flags.values()):
            raise UserError(
                "lora_config: train_attn, train_mlp and train_unembed are all false: nothing to train"
            )
        # The SDK never sends alpha; 32 for every rank is Tinker's documented scaling ("LoRA without regret").
        return LoraSpec(rank, 32.0, secrets.randbits(31) if seed is None else seed, **flags)

    @staticmethod
    def _load_args(source: Checkpoint, optimizer: bool) -> dict[str, Any]:
        if optimizer and source.kind != CheckpointKind.TRAINING:
            raise UserError(
                f"path: {source.path} holds no optimizer state: load a training checkpoint "
                "(tinker://.../weights/...), or load the weights alone"
            )
        return {"directory": source.directory, "optimizer": optimizer, "path": source.path}

    async def _accept(
        self, run: Run, kind: OpKind, seq: int, args: Mapping[str, Any], raw: bytes, **op: Any
    ) -> str:
        card = self.catalog.resolve(run.base_model)
        return await self._submit(run.tenant, card, kind, run.id, seq, args, raw, **op)

    async def _submit(
        self,
        tenant: str,
        card: ModelCard,
        kind: OpKind,
        run: str,
        seq: int,
        args: Mapping[str, Any],
        raw: bytes,
        tokens: int = 0,
        body: bytes = b"",
        content_type: str = JSON,
    ) -> str:
        """Journal an op and put it into its lane. The same (run, seq) and bytes give the same request id."""
        driver = self.driver(card)
        lanes = driver.lanes
        digest = hashlib.sha256(kind.value.encode() + raw).hexdigest()
        known = lanes.seen(run, seq, digest)
        if known is not None:
            return known
        if run not in self.ledger.state.runs and kind not in (OpKind.CREATE_MODEL, OpKind.LOAD_WEIGHTS):
            raise NotFound(f"model {run!r} does not exist, or belongs to somebody else")
        queued = sum(len(lane.queue) for lane in lanes.by_run.values() if lane.tenant == tenant)
        if queued >= self.limits.queued_ops_per_tenant:
            raise Overloaded(
                f"{queued} requests of yours wait already, the limit of this server: wait for results"
            )
        request_id = secrets.token_hex(16)
        lanes.remember(run, tenant, seq, digest, request_id)
        data = {
            "request_id": request_id,
            "run": run,
            "seq": seq,
            "op": kind.value,
            "tokens": tokens,
            "digest": digest,
            "args": args,
            "content_type": content_type,
        }
        try:
            record = await self.ledger.record("op_accepted", tenant, data, body)
        except Overloaded:
            lanes.forget(run, seq)
            raise
        lanes.push(Op(request_id, run, seq, kind, tenant, tokens, args, body, content_type), record.n)
        return request_id

    # ---- answers ----------------------------------------------------------------------------------------------

    async def retrieve(self, principal: Principal, request_id: str, timeout: float) -> Answer | None:
        """The answer to a promise, waiting up to ``timeout`` seconds; None if it is not there yet."""
        promise = self.ledger.promises.get(principal, request_id)
        answer = await self.ledger.promises.wait(promise, timeout)
        return None if answer is None else await self.ledger.answer(answer)

    def queue_reason(self, principal: Principal, request_id: str) -> str:
        """In words, what a promise waits for."""
        promise: Promise = self.ledger.promises.get(principal, request_id)
        run = self.ledger.state.runs.get(promise.owner)
        driver = self.drivers.get(run.base_model) if run is not None else None
        if run is None or driver is None:
            return self.sampling.reason(promise.owner)
        if driver.status != "ready":
            return driver.detail or "the training worker is starting"
        ahead, busy = driver.lanes.position(run.id, request_id)
        return f"{ahead} requests of this run come first; {busy} runs share the engine"

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def readable_checkpoint(self, principal: Principal, path: str) -> Checkpoint:
        """A checkpoint by its path: the principal's own, or one its owner published."""
        if not CHECKPOINT.match(path):
            raise UserError(
                f"path: {path!r} is no checkpoint path: it must look like "
                "tinker://<run>/weights/<name> or tinker://<run>/sampler_weights/<name>"
            )
        found = self.ledger.state.checkpoints.get(path)
        if found is not None and found.public:
            return found
        return owned(principal, self.ledger.state.checkpoints, path, "checkpoint")

    def checkpoints(self, principal: Principal, run: str | None = None) -> list[Checkpoint]:
        """The principal's checkpoints, newest first."""
        mine: Iterable[Checkpoint] = (
            c
            for c in self.ledger.state.checkpoints.values()
            if c.tenant == principal.tenant and (run is None or c.run == run)
        )
        return sorted(mine, key=lambda c: c.created, reverse=True)

    async def change_checkpoint(self, principal: Principal, path: str, change: Mapping[str, Any]) -> None:
        """Set ``expires`` (seconds since the epoch, or None) or ``public``."""
        found = owned(principal, self.ledger.state.checkpoints, path, "checkpoint")
        await self.ledger.record("checkpoint_changed", found.tenant, {"path": path, **change})

    async def delete_checkpoint(self, principal: Principal, path: str) -> None:
        await self._delete(owned(principal, self.ledger.state.checkpoints, path, "checkpoint"))

    async def _delete(self, checkpoint: Checkpoint) -> None:
        await self.ledger.record(
            "checkpoint_changed", checkpoint.tenant, {"path": checkpoint.path, "deleted": True}
        )
        used = {s.directory for s in self.ledger.state.samplers.values()}
        if checkpoint.directory not in used:
            await asyncio.to_thread(shutil.rmtree, checkpoint.directory, True)
