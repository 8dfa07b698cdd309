"""The verbs of the Tinker API: a request's bytes in, an answer's bytes out.

Each verb reads its message, asks the :class:`~tuft_jupyter.core.service.Service`, and writes the answer the SDK
expects (protocol sections are those of the Tinker wire contract). Every failure is raised as a
:class:`~tuft_jupyter.core.errors.TuftError`; :func:`error_reply` gives all of them one JSON shape. It knows nothing of
Tornado, and never looks inside tensors.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from tuft_jupyter.core.errors import Overloaded, TuftError, UserError
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.state import Checkpoint, Run
from tuft_jupyter.core.types import JSON, CheckpointKind, ModelCard, OpKind, Principal
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.peek import peek_forward_backward
from tuft_jupyter.wire.routes import Route

HOLD_SECONDS = 20.0
"""How long a poll is held: the SDK gives up at 45 or 90 s and never sleeps between polls."""

MAX_SAMPLES = 4096
MIN_TTL, MAX_TTL = 1.0, 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who asks, the route's path parts and query, and the body (decompressed)."""

    principal: Principal
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = JSON


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def reply(value: Any, status: int = 200) -> Reply:
    return Reply(msgspec.json.encode(value), status)


def error_reply(error: TuftError) -> Reply:
    """``{"detail", "error", "category"}``: what the SDK shows, in one shape for every route."""
    headers = {"Retry-After": f"{math.ceil(error.retry_after)}"} if isinstance(error, Overloaded) else {}
    body = {"detail": error.message, "error": error.message, "category": error.category}
    return Reply(msgspec.json.encode(body), error.status, headers=headers)


class Host(Protocol):
    """What the api asks of the server around it."""

    def status(self, principal: Principal) -> dict[str, Any]:
        """Readiness in words and numbers, as the lab and ``%tuft status`` show it."""

    async def add_model(self, principal: Principal, model: str) -> ModelCard:
        """Offer one more base model and begin to load it."""

    def tokenizer(self, card: ModelCard) -> dict[str, str]:
        """The model's tokenizer files by name, as text."""


class Api:
    def __init__(self, service: Service, host: Host, hold_seconds: float = HOLD_SECONDS) -> None:
        self.service = service
        self.host = host
        self.hold_seconds = hold_seconds

    async def answer(self, route: Route, call: Call) -> Reply:
        """Answer one request; failures come back as replies, never as exceptions of ours."""
        verb: Callable[[Call], Awaitable[Reply]] = getattr(self, route.verb)
        try:
            return await verb(call)
        except TuftError as error:
            return error_reply(error)

    # ---- bootstrap (section 2.1) ------------------------------------------------------------------------------

    async def healthz(self, call: Call) -> Reply:
        return reply({"status": "ok", "server": "tuft-jupyter"})

    async def client_config(self, call: Call) -> Reply:
        m.decode(m.ClientConfig, call.body)
        return reply(
            {
                "pjwt_auth_enabled": False,
                "parallel_fwdbwd_chunks": True,
                "proto_compress_fwdbwd": False,
                "sample_max_concurrent_requests": 256,
                # SDKs 0.22 to 0.36 take the same path as the newest one when these are set (section 2.2).
                "proto_write_fwdbwd": True,
                "fwd_via_fwdbwd": True,
                "create_model_via_load_weights": True,
            }
        )

    async def dynamic_config(self, call: Call) -> Reply:
        return reply(
            {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}
        )

    async def capabilities(self, call: Call) -> Reply:
        models = [
            {
                "model_name": card.name,
                "max_context_length": card.max_context_length,
                "trainable": True,
                "sampleable": True,
            }
            for card in self.service.catalog.cards()
        ]
        return reply({"supported_models": models})

    async def status(self, call: Call) -> Reply:
        return reply(self.host.status(call.principal))

    async def add_model(self, call: Call) -> Reply:
        card = await self.host.add_model(call.principal, m.decode(m.AddModel, call.body).model)
        return reply({"name": card.name})

    async def tokenizer(self, call: Call) -> Reply:
        card = self.service.catalog.resolve(call.query.get("model", ""))
        return reply({"model": card.name, "files": self.host.tokenizer(card)})

    # ---- sessions (section 2.3) -------------------------------------------------------------------------------

    async def create_session(self, call: Call) -> Reply:
        asked = m.decode(m.CreateSession, call.body)
        details = msgspec.to_builtins(asked)
        session = await self.service.open_session(call.principal, details)
        return reply({"session_id": session, "type": "create_session"})

    async def heartbeat(self, call: Call) -> Reply:
        self.service.heartbeat(call.principal, m.decode(m.SessionOnly, call.body).session_id)
        return reply({"type": "session_heartbeat"})

    async def list_sessions(self, call: Call) -> Reply:
        mine = [s for s in self.service.state.sessions.values() if s.tenant == call.principal.tenant]
        page = _page(sorted(mine, key=lambda s: -s.created), call.query, 20)
        return reply({"sessions": [s.id for s in page]})

    async def get_session(self, call: Call) -> Reply:
        session = self.service.session(call.principal, call.path["session"])
        state = self.service.state
        return reply(
            {
                "training_run_ids": [r.id for r in state.runs.values() if r.session == session.id],
                "sampler_ids": [s.id for s in state.samplers.values() if s.session == session.id],
                "user_metadata": session.user_metadata,
                "display_name": session.display_name,
            }
        )

    async def finish_session(self, call: Call) -> Reply:
        asked = m.decode(m.FinishSession, call.body)
        await self.service.finish_session(
            call.principal, call.path["session"], asked.reason.type, asked.detail
        )
        return reply({})

    async def telemetry(self, call: Call) -> Reply:
        return reply({"status": "accepted"})

    # ---- training (sections 2.5 to 2.9) -----------------------------------------------------------------------

    async def create_model(self, call: Call) -> Reply:
        asked = m.decode(m.CreateModel, call.body)
        _adamw_only(asked.optimizer_config)
        lora = msgspec.to_builtins(asked.lora_config)
        request_id = await self.service.create_model(
            call.principal,
            asked.session_id,
            asked.model_seq_id,
            asked.base_model,
            lora,
            asked.user_metadata or {},
            call.body,
        )
        return reply({"request_id": request_id})

    async def get_info(self, call: Call) -> Reply:
        run = self.service.run(call.principal, m.decode(m.ModelOnly, call.body).model_id)
        card = self.service.catalog.resolve(run.base_model)
        return reply(
            {
                "type": "get_info",
                "model_id": run.id,
                "model_name": card.name,
                "is_lora": True,
                "lora_rank": run.lora.get("rank"),
                "model_data": {"arch": card.arch, "model_name": card.name, "tokenizer_id": card.name},
                "optimizer_config": {"type": "adamw"},
            }
        )

    async def unload_model(self, call: Call) -> Reply:
        model = m.decode(m.ModelOnly, call.body).model_id
        return _promise(await self.service.unload(call.principal, model, call.body), model)

    async def forward(self, call: Call) -> Reply:
        return await self._pass(call, OpKind.FORWARD)

    async def forward_backward(self, call: Call) -> Reply:
        return await self._pass(call, OpKind.FORWARD_BACKWARD)

    async def _pass(self, call: Call, kind: OpKind) -> Reply:
        peek = peek_forward_backward(call.body, call.content_type)
        request_id = await self.service.forward_backward(
            call.principal,
            peek.run,
            peek.seq,
            peek.tokens,
            call.body,
            call.content_type,
            backward=kind is OpKind.FORWARD_BACKWARD and not peek.forward_only,
        )
        return _promise(request_id, peek.run)

    async def optim_step(self, call: Call) -> Reply:
        asked = m.decode(m.OptimStep, call.body)
        if asked.optimizer_params is not None:
            kind = asked.optimizer_params.get("type")
            raise UserError(
                f"optimizer_params: this run was created with adamw, not {kind!r}: send adam_params"
            )
        adam = (asked.adam_params or m.Adam()).checked()
        request_id = await self.service.optim_step(
            call.principal, asked.model_id, asked.seq_id, adam, call.body
        )
        return _promise(request_id, asked.model_id)

    async def save_weights(self, call: Call) -> Reply:
        asked = m.decode(m.SaveWeights, call.body)
        request_id = await self.service.save_weights(
            call.principal,
            asked.model_id,
            asked.seq_id,
            asked.path or f"{asked.seq_id:06d}",
            CheckpointKind.TRAINING,
            call.body,
            ttl=_ttl(asked.ttl_seconds),
            overwrite=asked.overwrite,
            user_metadata=asked.user_metadata,
        )
        return _promise(request_id, asked.model_id)

    async def save_weights_for_sampler(self, call: Call) -> Reply:
        asked = m.decode(m.SaveWeightsForSampler, call.body)
        if asked.path is None and asked.sampling_session_seq_id is not None:
            request_id = await self.service.save_for_sampling_session(
                call.principal, asked.model_id, asked.seq_id, asked.sampling_session_seq_id, call.body
            )
            return _promise(request_id, asked.model_id)
        request_id = await self.service.save_weights(
            call.principal,
            asked.model_id,
            asked.seq_id,
            asked.path or f"{asked.seq_id:06d}",
            CheckpointKind.SAMPLER,
            call.body,
            ttl=_ttl(asked.ttl_seconds),
            user_metadata=asked.user_metadata,
        )
        return _promise(request_id, asked.model_id)

    async def load_weights(self, call: Call) -> Reply:
        asked = m.decode(m.LoadWeights, call.body)
        _adamw_only(asked.optimizer_config)
        if asked.model_id is not None:
            request_id = await self.service.load_weights(
                call.principal, asked.model_id, asked.seq_id, asked.path, asked.optimizer, call.body
            )
            return _promise(request_id, asked.model_id)
        if asked.session_id is None or asked.model_seq_id is None:
            raise UserError("load_weights: give model_id, or session_id together with model_seq_id")
        request_id = await self.service.load_new_model(
            call.principal,
            asked.session_id,
            asked.model_seq_id,
            asked.path,
            asked.optimizer,
            asked.user_metadata or {},
            call.body,
        )
        return _promise(request_id, None)

    # ---- promises (section 2.4) -------------------------------------------------------------------------------

    async def retrieve_future(self, call: Call) -> Reply:
        asked = m.decode(m.RetrieveFuture, call.body)
        answer = await self.service.retrieve(call.principal, asked.request_id, self.hold_seconds)
        if answer is None:
            waiting = {
                "type": "try_again",
                "request_id": asked.request_id,
                "queue_state": "active",
                "queue_state_reason": self.service.queue_reason(call.principal, asked.request_id),
            }
            return reply(waiting, 408)
        return _answer(answer)

    async def cancel_future(self, call: Call) -> Reply:
        asked = m.decode(m.RequestOnly, call.body)
        await self.service.sampling.cancel(call.principal, asked.request_id)
        return reply({})

    # ---- sampling (section 2.10) ------------------------------------------------------------------------------

    async def create_sampling_session(self, call: Call) -> Reply:
        asked = m.decode(m.CreateSamplingSession, call.body)
        session = self.service.live_session(call.principal, asked.session_id)
        checkpoint = None
        if asked.model_path is not None:
            checkpoint = self.service.readable_checkpoint(call.principal, asked.model_path)
            card = self.service.catalog.resolve(checkpoint.base_model)
        elif asked.base_model is not None:
            card = await self.service.card(call.principal, asked.base_model)
        else:
            raise UserError("create_sampling_session: give base_model or model_path")
        sampler = await self.service.sampling.open(
            call.principal, session.id, asked.sampling_session_seq_id, card, checkpoint
        )
        return reply({"sampling_session_id": sampler.id, "type": "create_sampling_session"})

    async def get_sampler(self, call: Call) -> Reply:
        sampler = self.service.sampling.get(call.principal, call.path["sampler"])
        return reply(
            {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}
        )

    async def asample(self, call: Call) -> Reply:
        asked = m.decode(m.SampleEnvelope, call.body)
        if not 1 <= asked.num_samples <= MAX_SAMPLES:
            raise UserError(
                f"num_samples: {asked.num_samples} is outside 1..{MAX_SAMPLES}: split the request"
            )
        sampler, seq = asked.sampling_session_id, asked.seq_id
        request_id = self.service.sampling.submit(call.principal, sampler, seq, call.body)
        sequences = [f"{sampler}:{seq}:{i}" for i in range(asked.num_samples)]
        return reply({"request_id": request_id, "sample_sequence_ids": sequences})

    # ---- rest (section 2.13) ----------------------------------------------------------------------------------

    async def list_runs(self, call: Call) -> Reply:
        mine = [r for r in self.service.state.runs.values() if r.tenant == call.principal.tenant]
        page = _page(sorted(mine, key=lambda r: -r.created), call.query, 20)
        cursor = _cursor(call.query, 20, len(mine))
        return reply({"training_runs": [self._run(run) for run in page], "cursor": cursor})

    async def get_run(self, call: Call) -> Reply:
        return reply(self._run(self.service.run(call.principal, call.path["run"])))

    async def list_run_checkpoints(self, call: Call) -> Reply:
        run = self.service.run(call.principal, call.path["run"])
        found = [c for c in self.service.checkpoints(Principal(run.tenant), run.id)]
        return reply({"checkpoints": [_checkpoint(c) for c in found]})

    async def list_checkpoints(self, call: Call) -> Reply:
        mine = self.service.checkpoints(call.principal)
        page = _page(mine, call.query, 100)
        cursor = _cursor(call.query, 100, len(mine))
        return reply({"checkpoints": [_checkpoint(c) for c in page], "cursor": cursor})

    async def set_ttl(self, call: Call) -> Reply:
        ttl = _ttl(m.decode(m.SetTtl, call.body).ttl_seconds)
        expires = None if ttl is None else self.service.ledger.clock() + ttl
        await self.service.change_checkpoint(call.principal, _path(call), {"expires": expires})
        return reply({})

    async def publish(self, call: Call) -> Reply:
        await self.service.change_checkpoint(call.principal, _path(call), {"public": True})
        return reply({})

    async def unpublish(self, call: Call) -> Reply:
        await self.service.change_checkpoint(call.principal, _path(call), {"public": False})
        return reply({})

    async def delete_checkpoint(self, call: Call) -> Reply:
        await self.service.delete_checkpoint(call.principal, _path(call))
        return reply({})

    async def weights_info(self, call: Call) -> Reply:
        asked = m.decode(m.TinkerPath, call.body)
        found = self.service.readable_checkpoint(call.principal, asked.tinker_path)
        flags = {name: found.lora.get(name) for name in ("train_unembed", "train_mlp", "train_attn")}
        return reply(
            {
                "base_model": found.base_model,
                "is_lora": True,
                "lora_rank": found.lora.get("rank"),
                "optimizer_config": {"type": "adamw"},
                **flags,
            }
        )

    def _run(self, run: Run) -> dict[str, Any]:
        saved = self.service.checkpoints(Principal(run.tenant), run.id)
        last = {kind: next((c for c in saved if c.kind == kind), None) for kind in CheckpointKind}
        training, sampler = last[CheckpointKind.TRAINING], last[CheckpointKind.SAMPLER]
        return {
            "training_run_id": run.id,
            "base_model": run.base_model,
            "model_owner": run.tenant,
            "is_lora": True,
            "lora_rank": run.lora.get("rank"),
            "corrupted": run.status == "failed",
            "last_request_time": _time(run.last_request),
            "last_checkpoint": _checkpoint(training) if training else None,
            "last_sampler_checkpoint": _checkpoint(sampler) if sampler else None,
            "user_metadata": run.user_metadata,
        }


def _promise(request_id: str, model: str | None) -> Reply:
    return reply({"request_id": request_id, "model_id": model} if model else {"request_id": request_id})


def _answer(answer: Answer) -> Reply:
    if answer.body is None:
        return reply({"error": answer.error, "category": answer.category})
    return Reply(answer.body, content_type=answer.content_type)


def _adamw_only(config: m.OptimizerConfig | None) -> None:
    if config is not None and config.type != "adamw":
        raise UserError(f"optimizer_config.type: {config.type!r} is not offered by this server: use 'adamw'")


def _ttl(seconds: float | None) -> float | None:
    if seconds is not None and not MIN_TTL <= seconds <= MAX_TTL:
        raise UserError(
            f"ttl_seconds: {seconds} is outside {MIN_TTL:g}..{MAX_TTL:g} seconds (null keeps for ever)"
        )
    return seconds


def _path(call: Call) -> str:
    return f"tinker://{call.path['run']}/{call.path['kind']}/{call.path['name']}"


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name}: {text!r} is not a whole number of at least 0")
    return int(text)


def _page(items: Sequence[Any], query: Mapping[str, str], default: int) -> Sequence[Any]:
    offset = _number(query, "offset", 0)
    return items[offset : offset + _number(query, "limit", default)]


def _cursor(query: Mapping[str, str], default: int, total: int) -> dict[str, int]:
    limit = _number(query, "limit", default)
    return {"offset": _number(query, "offset", 0), "limit": limit, "total_count": total}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": "training" if checkpoint.kind == CheckpointKind.TRAINING else "sampler",
        "time": _time(checkpoint.created),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": None if checkpoint.expires is None else _time(checkpoint.expires),
    }
