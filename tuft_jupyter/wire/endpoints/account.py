"""Who one is and what one used: keys and tokens, usage, audit (protocol section 2.13).

Everything here is about the caller alone; a server's owner sees no other tenant's usage in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tuft_jupyter.core import usage
from tuft_jupyter.core.errors import Forbidden, UserError
from tuft_jupyter.core.state import Checkpoint
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, iso_time, reply, urn_of

ORGANIZATION = "tuft-jupyter"
MAX_DAYS = 14


class AccountEndpoints(Endpoints):
    async def auth_token(self, call: Call) -> Reply:
        return reply(
            {"jwt": self.host.tickets.token(_credential(call), urn_of(call.principal.tenant), ORGANIZATION)}
        )

    async def key_info(self, call: Call) -> Reply:
        details = {
            "org_details": {"name": ORGANIZATION},
            "user_details": {"email": call.principal.tenant},
        }
        number = int(_credential(call)[:12], 16)
        name = f"key of {call.principal.tenant}"
        return reply({"key_id": number, "name": name, "note": "", "details": details})

    async def revoke_key(self, call: Call) -> Reply:
        await self.host.keybook.revoke_digest(call.principal, _credential(call))
        return reply({})

    async def usage_events(self, call: Call) -> Reply:
        """Seconds of the engine come per session, beside its metadata; there are no prices."""
        start, end = _time(call.query, "starting_on"), _time(call.query, "ending_before")
        if not 0 < end - start <= MAX_DAYS * 86400:
            raise UserError(f"ending_before: it must lie after starting_on, at most {MAX_DAYS} days")
        await self.service.sampling.usage.flush()
        state, tenant = self.service.state, call.principal.tenant
        events = usage.hourly(state, tenant, start, end)
        sessions: dict[str, Any] = {}
        for bucket in (bucket for bucket, _ in events if bucket.session):
            session = state.sessions.get(bucket.session)
            engine = sum(r.engine_ms for r in state.runs.values() if r.session == bucket.session)
            sessions[bucket.session] = {
                "user_metadata": (session.user_metadata or None) if session else None,
                "engine_seconds": engine / 1e3,
            }
        return reply({"data": [self._event(tenant, bucket, n) for bucket, n in events], "sessions": sessions})

    def _event(self, tenant: str, bucket: usage.Bucket, count: int) -> dict[str, Any]:
        session = self.service.state.sessions.get(bucket.session)
        info = {"type": bucket.kind, "count" if bucket.kind == "checkpoint" else "token_count": count}
        if bucket.kind == "sampling_prefill":
            info["cached"] = False
        return {
            "bucket_start": iso_time(bucket.start),
            "bucket_end": iso_time(bucket.start + usage.HOUR),
            "base_model": bucket.base_model,
            "user_id": urn_of(tenant),
            "user_name": tenant,
            "session_id": bucket.session or None,
            "project_id": session.project_id if session else None,
            "event_info": info,
        }

    async def usage_checkpoints(self, call: Call) -> Reply:
        state, tenant = self.service.state, call.principal.tenant
        by_project: defaultdict[str | None, list[Checkpoint]] = defaultdict(list)
        for checkpoint in usage.kept(state, tenant):
            session = state.sessions.get(state.runs[checkpoint.run].session)
            by_project[session.project_id if session else None].append(checkpoint)
        wanted = call.query.get("project_id")
        items = [
            {
                "project_id": project,
                "org_user_urn": urn_of(tenant),
                "user_name": tenant,
                "checkpoint_count": len(found),
                "size_bytes": sum(c.size_bytes for c in found),
                "size_gigabytes": sum(c.size_bytes for c in found) / 1e9,
            }
            for project, found in by_project.items()
            if wanted is None or wanted == project
        ]
        return reply({"data": items})

    async def audit(self, call: Call) -> Reply:
        """What the journal's state tells of one UTC day (``day``, today if it is left out), by ``event_type``."""
        state, tenant = self.service.state, call.principal.tenant
        day = (
            call.query.get("day")
            or datetime.fromtimestamp(self.service.ledger.clock(), UTC).date().isoformat()
        )
        start = _time({"day": day}, "day")
        entries = [
            (s.created, "session_create", {"session_id": s.id})
            for s in state.sessions.values()
            if s.tenant == tenant
        ]
        entries += [
            (r.created, "training_run_create", {"training_run_id": r.id})
            for r in state.runs.values()
            if r.tenant == tenant
        ]
        entries += [
            (c.created, "checkpoint_create", {"tinker_path": c.path}) for c in usage.kept(state, tenant)
        ]
        wanted = call.query.get("event_type", "")
        shown = [
            {"timestamp": iso_time(time), "event": event, "event_details": {"user": tenant, **details}}
            for time, event, details in sorted(entries, key=lambda entry: entry[0])
            if start <= time < start + 86400 and (not wanted or event.startswith(wanted))
        ]
        return reply({"entries": shown})


def _credential(call: Call) -> str:
    if not call.credential:
        raise Forbidden("a token can neither make another one nor speak for its key: send the key itself")
    return call.credential


def _time(query: Mapping[str, str], name: str) -> float:
    """Seconds since the epoch; without a zone, the time is UTC."""
    try:
        found = datetime.fromisoformat(query.get(name, ""))
    except ValueError:
        raise UserError(
            f"{name}: {query.get(name, '')!r} is no time: write it as 2026-07-13T00:00:00Z"
        ) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
