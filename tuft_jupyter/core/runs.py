"""Runs: adapters in training, and the ops that clients ask of them.

Each method checks ownership first, then the request, then journals the op and puts it into its lane; the answer comes
later through the op's promise. A refused request changes nothing. The driver runs the ops.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.checkpoints import Checkpoints
from tuft_jupyter.core.driver import Driver
from tuft_jupyter.core.ephemeral import Ephemeral
from tuft_jupyter.core.errors import Overloaded, TuftError, UserError
from tuft_jupyter.core.idempotency import already_used
from tuft_jupyter.core.lanes import Lanes
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.lifetimes import LAST_CHECKPOINT, Lifetimes
from tuft_jupyter.core.quotas import Limits, Quotas
from tuft_jupyter.core.sessions import Sessions
from tuft_jupyter.core.state import ENDED, Checkpoint, Run
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

log = logging.getLogger("tuft_jupyter.runs")

ALPHA = 32.0
"""The LoRA numerator for every rank: the SDK never sends one, and Tinker documents this scaling."""


class Runs:
    """``driver`` gives the driver of a base model by its name, ``card`` the base model a request names.

    ``home`` is where weights go that have no name.
    """

    def __init__(
        self,
        ledger: Ledger,
        sessions: Sessions,
        checkpoints: Checkpoints,
        driver: Callable[[str], Driver],
        card: Callable[[Principal, str], Awaitable[ModelCard]],
        home: Path,
        ephemeral: Ephemeral,
        limits: Limits,
        quotas: Quotas,
        lifetimes: Lifetimes,
    ) -> None:
        self.ledger = ledger
        self.sessions = sessions
        self.checkpoints = checkpoints
        self.limits = limits
        self.quotas = quotas
        self.lifetimes = lifetimes
        self._driver = driver
        self._card = card
        self._home = home
        self.ephemeral = ephemeral
        self._accepting: dict[tuple[str, int], tuple[str, asyncio.Task[str]]] = {}

    def get(self, principal: Principal, run: str) -> Run:
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
        found = self.sessions.live(principal, session)
        card = await self._card(principal, base_model)
        spec = self._lora(card, lora)
        args = {
            "session": found.id,
            "base_model": card.name,
            "lora": asdict(spec),
            "user_metadata": dict(user_metadata),
        }
        run = run_id(session, number)
        with self.quotas.opening(found.tenant, card.name, run, self._in_use()):
            return await self._submit(found.tenant, card.name, OpKind.CREATE_MODEL, run, 0, args, raw)

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
        found = self.sessions.live(principal, session)
        source = self.checkpoints.readable(principal, path)
        card = await self._card(principal, source.base_model)
        args = {
            "session": found.id,
            "base_model": card.name,
            "lora": dict(source.lora),
            "user_metadata": dict(user_metadata),
            "facts": {"step": source.step if optimizer else 0},
            **self._load_args(source, optimizer),
        }
        run = run_id(session, number)
        with self.quotas.opening(found.tenant, card.name, run, self._in_use()):
            return await self._submit(found.tenant, card.name, OpKind.LOAD_WEIGHTS, run, 0, args, raw)

    async def load_weights(
        self, principal: Principal, run: str, seq: int, path: str, optimizer: bool, raw: bytes
    ) -> str:
        """Accept the replacing of a run's adapter by a checkpoint's."""
        found = self.live(principal, run)
        source = self.checkpoints.readable(principal, path)
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
        found = self.live(principal, run)
        kind = OpKind.FORWARD_BACKWARD if backward else OpKind.FORWARD
        return await self._accept(
            found, kind, seq, {}, body, tokens=tokens, body=body, content_type=content_type
        )

    async def optim_step(self, principal: Principal, run: str, seq: int, adam: AdamParams, raw: bytes) -> str:
        found = self.live(principal, run)
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
        recipients: Sequence[str] = (),
    ) -> str:
        """Accept the saving of a run: with its optimizer as a training checkpoint, else the weights alone."""
        found = self.live(principal, run)
        training = kind is CheckpointKind.TRAINING
        op = OpKind.SAVE_WEIGHTS if training else OpKind.SAVE_WEIGHTS_FOR_SAMPLER
        known = self.ledger.seen.find(run, seq, _digest(op, raw))
        if known is not None:  # its name is taken by now, and its bytes are counted
            return known
        saved = self.checkpoints.plan(
            run,
            kind,
            name,
            ttl=ttl,
            overwrite=overwrite,
            user_metadata=user_metadata,
            recipients=recipients,
        )
        args = {
            "directory": saved["directory"],
            "optimizer": training,
            "path": saved["path"],
            "facts": {"checkpoint": saved},
        }
        if (run, seq) in self._accepting:
            return await self._accept(found, op, seq, args, raw)
        size = self.checkpoints.expected(found, kind)
        with self.checkpoints.room(found.tenant, saved["directory"], size) as until:
            request_id = await self._accept(found, op, seq, args, raw)
            until(request_id)
        return request_id

    async def save_for_sampling_session(
        self, principal: Principal, run: str, seq: int, number: int, raw: bytes
    ) -> str:
        """Accept an ephemeral save: the weights become a sampler at once, without a checkpoint."""
        found = self.live(principal, run)
        self.ephemeral.check(self.sessions.get(principal, found.session))
        directory = str(self._home / uuid.uuid4().hex)
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
        found = self.live(principal, run)
        return await self._accept(found, OpKind.UNLOAD_MODEL, -1, {}, raw)

    async def resume(self, principal: Principal, run: str, session: str) -> Run:
        """Let another session of the same tenant go on with a run; the ops it has accepted are not disturbed."""
        found = self.get(principal, run)
        self.lifetimes.check(found)
        self._usable(found)
        if self.sessions.live(principal, session).tenant != found.tenant:
            raise UserError(
                f"session_id: {session!r} and model {run!r} have different owners: use a session of the model's owner"
            )
        if session != found.session:
            await self.ledger.record("run_resumed", found.tenant, {"run": run, "session": session})
        return found

    def live(self, principal: Principal, run: str) -> Run:
        found = self.get(principal, run)
        self.lifetimes.check(found)
        self._usable(found)
        self.sessions.live(principal, found.session)
        return found

    async def close_over(self, now: float) -> None:
        """Save the runs whose lifetime is over, then close those that are saved; accepted ops are done before."""
        for run in self.lifetimes.over(now):
            try:
                await self._close(run, now)
            except TuftError as error:  # a base model that is not on offer, a full disk: it is tried again
                log.warning("run %s is past its lifetime and cannot be closed: %s", run.id, error)

    async def _close(self, run: Run, now: float) -> None:
        kind = CheckpointKind.TRAINING
        last = self.ledger.state.checkpoints.get(checkpoint_path(run.id, kind, LAST_CHECKPOINT))
        if last is not None and last.created > (self.lifetimes.end(run) or 0.0):
            await self._submit(run.tenant, run.base_model, OpKind.UNLOAD_MODEL, run.id, -1, {}, b"")
        elif not run.pending:
            log.warning("run %s reached its longest lifetime: it is saved and closed", run.id)
            saved = self.checkpoints.plan(
                run.id, kind, LAST_CHECKPOINT, ttl=None, overwrite=True, user_metadata=None
            )
            args = {"directory": saved["directory"], "optimizer": True, "path": saved["path"]}
            args["facts"] = {"checkpoint": saved}
            seq = -2 - int(now)  # another number each time: a save that failed is tried again
            await self._submit(run.tenant, run.base_model, OpKind.SAVE_WEIGHTS, run.id, seq, args, b"")

    @staticmethod
    def _usable(run: Run) -> None:
        if run.status in ENDED:
            raise UserError(
                f"model {run.id!r} cannot be used any more ({run.error or 'it was unloaded'}): "
                "create a new one, or load a checkpoint into one"
            )

    def _lora(self, card: ModelCard, lora: Mapping[str, Any]) -> LoraSpec:
        rank, limit = lora["rank"], card.max_rank or self.limits.max_rank
        if not 1 <= rank <= limit:
            raise UserError(
                f"lora_config.rank: {rank} is outside 1..{limit}, the limit for {card.name} on this server "
                "(max_lora_rank): choose one of those"
            )
        seed = lora.get("seed")
        flags = {name: bool(lora.get(name, True)) for name in ("train_attn", "train_mlp", "train_unembed")}
        if not any(flags.values()):
            raise UserError(
                "lora_config: train_attn, train_mlp and train_unembed are all false: set at least one of them"
            )
        return LoraSpec(rank, ALPHA, secrets.randbits(31) if seed is None else seed, **flags)

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
        """An idle run that left its place to others needs one again."""
        lane = self._driver(run.base_model).lanes.by_run.get(run.id)
        with contextlib.ExitStack() as place:
            if lane is None or not (lane.resident or lane.queue):
                place.enter_context(self.quotas.opening(run.tenant, run.base_model, run.id, self._in_use()))
            return await self._submit(run.tenant, run.base_model, kind, run.id, seq, args, raw, **op)

    def _in_use(self) -> Iterator[tuple[str, str, str]]:
        return self.lifetimes.in_use(self.ledger.clock())

    async def _submit(
        self,
        tenant: str,
        base_model: str,
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
        lanes = self._driver(base_model).lanes
        digest = _digest(kind, raw)
        known = self.ledger.seen.find(run, seq, digest)
        if known is not None:
            return known
        waiting = self._accepting.get((run, seq))
        if waiting is None:
            mine = [len(e.op.body) for ln in lanes.by_run.values() if ln.tenant == tenant for e in ln.queue]
            most, room = self.limits.queued_ops_per_tenant, self.limits.queued_bytes_per_tenant
            if len(mine) >= most or (mine and body and sum(mine) + len(body) > room):
                raise Overloaded(
                    f"{len(mine)} requests of yours wait already, with {sum(mine)} bytes; the limits of this server "
                    f"are {most} and {room}: wait for results"
                )
            op = Op(secrets.token_hex(16), run, seq, kind, tenant, tokens, args, body, content_type)
            # A task of its own: a client that goes away leaves no op that is on record and in no lane.
            task = asyncio.get_running_loop().create_task(self._record(op, digest, lanes))
            waiting = self._accepting[run, seq] = (digest, task)
            task.add_done_callback(lambda done: self._accepted(run, seq, done))
        elif waiting[0] != digest:
            raise already_used(run, seq)
        # Asked twice at once: neither is answered before it is durable.
        return await asyncio.shield(waiting[1])

    def _accepted(self, run: str, seq: int, done: asyncio.Task[str]) -> None:
        del self._accepting[run, seq]
        if not done.cancelled():
            done.exception()  # those who asked may all have gone away

    async def _record(self, op: Op, digest: str, lanes: Lanes) -> str:
        data = {
            "request_id": op.request_id,
            "run": op.run,
            "seq": op.seq,
            "op": op.kind.value,
            "tokens": op.tokens,
            "digest": digest,
            "args": op.args,
            "content_type": op.content_type,
        }
        record = await self.ledger.record("op_accepted", op.tenant, data, op.body)
        lanes.push(op, record.n)
        return op.request_id


def _digest(kind: OpKind, raw: bytes) -> str:
    """What tells a request that is sent again from another one under the same number."""
    return hashlib.sha256(kind.value.encode() + raw).hexdigest()
