"""Connecting: configuration of the SDK, what is on offer, sessions (protocol sections 2.1 to 2.3)."""

from __future__ import annotations

import msgspec

from tuft_jupyter.core.errors import Forbidden, UserError
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, page_of, reply
from tuft_jupyter.wire.openapi import document

EVENTS = frozenset(("SESSION_START", "SESSION_END", "UNHANDLED_EXCEPTION", "GENERIC_EVENT"))
MAX_EVENTS = 10_000
"""In one request; the SDK sends 100."""
DETAIL = 10_000
"""Characters kept of what a client says of its end."""
SEVERITIES = frozenset(("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))


class SessionEndpoints(Endpoints):
    async def healthz(self, call: Call) -> Reply:
        return reply({"status": "ok", "server": "tuft-jupyter"})

    async def openapi(self, call: Call) -> Reply:
        return reply(document(call.root.removesuffix("/api/v1")))

    async def readyz(self, call: Call) -> Reply:
        """Nobody's name and no model is told: whoever may ask for more has ``/tuft/status``."""
        if self.host.serving:
            return reply({"status": "ready"})
        return reply({"status": "waiting"}, 503)

    async def metrics(self, call: Call) -> Reply:
        if not call.principal.admin:
            raise Forbidden("only the owner of this server and its admins may read its metrics")
        body, content_type = self.host.metrics()
        return Reply(body, content_type=content_type)

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
                "custom_loss_server_side": self.service.limits.custom_loss,
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
                "trainable": card.trainable,
                "sampleable": card.sampleable,
            }
            for card in self.service.catalog.cards()
        ]
        return reply({"supported_models": models})

    async def status(self, call: Call) -> Reply:
        return reply(self.host.status(call.principal))

    async def applications(self, call: Call) -> Reply:
        """All of them; where the path is one's own, that one."""
        known = self.host.status(call.principal)["applications"]
        name = call.path.get("application")
        return reply({"applications": known} if name is None else next(a for a in known if a["name"] == name))

    async def add_model(self, call: Call) -> Reply:
        card = await self.host.add_model(call.principal, m.decode(m.AddModel, call.body).model)
        return reply({"name": card.name})

    async def tokenizer(self, call: Call) -> Reply:
        card = self.service.catalog.resolve(call.query.get("model", ""))
        return reply({"model": card.name, "files": self.host.tokenizer(card)})

    async def create_session(self, call: Call) -> Reply:
        asked = m.decode(m.CreateSession, call.body)
        details = msgspec.to_builtins(asked)
        session = await self.service.sessions.open(call.principal, details)
        return reply({"session_id": session, "type": "create_session"})

    async def heartbeat(self, call: Call) -> Reply:
        self.service.sessions.heartbeat(call.principal, m.decode(m.SessionOnly, call.body).session_id)
        return reply({"type": "session_heartbeat"})

    async def list_sessions(self, call: Call) -> Reply:
        page = page_of(self.service.sessions.mine(call.principal), call.query, 20)
        return reply({"sessions": [s.id for s in page]})

    async def get_session(self, call: Call) -> Reply:
        session = self.service.sessions.get(call.principal, call.path["session"])
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
        detail = asked.detail and asked.detail[:DETAIL]  # a traceback, say: no reason to keep a session open
        await self.service.finish_session(call.principal, call.path["session"], asked.reason.type, detail)
        return reply({})

    async def telemetry(self, call: Call) -> Reply:
        """Events carry paths and tracebacks of the user's own code: only their kind is looked at."""
        events = m.decode(m.Telemetry, call.body).events
        if len(events) > MAX_EVENTS:
            raise UserError(f"events: {len(events)} are more than {MAX_EVENTS}: send them in parts")
        for event in events:
            kind = event.event if event.event in EVENTS else "other"
            severity = event.severity if event.severity in SEVERITIES else "other"
            self.service.counters.add("sdk_events", event=kind, severity=severity)
        return reply({"status": "accepted"})
