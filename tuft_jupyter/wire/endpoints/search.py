"""Finding sessions again: projects, search, traces (protocol section 2.13)."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from tuft_jupyter.core.state import Session
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, iso_time, reply, urn_of

NO_PROJECT = "default"
FINISHED = ("success", "errored", "interrupted")


class SearchEndpoints(Endpoints):
    async def assign_project(self, call: Call) -> Reply:
        project = m.decode(m.Project, call.body).project_id
        await self.service.sessions.assign(call.principal, call.path["session"], project)
        return reply({})

    async def trace_export(self, call: Call) -> Reply:
        self.service.sessions.get(call.principal, call.path["session"])
        return reply({"status": "failed", "error": "this server records no traces of requests"})

    async def search_sessions(self, call: Call) -> Reply:
        """Newest first; only ever the caller's own."""
        asked = m.decode(m.SearchSessions, call.body)
        owner = asked.owner or m.SearchOwner()
        mine = self.service.sessions.mine(call.principal)
        if owner.type == "user" and urn_of(call.principal.tenant) not in owner.owner_urns:
            mine = []
        found = [s for s in mine if _matches(s, asked)]
        cursor = asked.cursor
        if cursor is not None:
            ids = [s.id for s in found]
            if cursor.last_session_id in ids:
                found = found[ids.index(cursor.last_session_id) + 1 :]
            else:
                before = cursor.last_created_at
                before = before if before.tzinfo else before.replace(tzinfo=UTC)
                found = [s for s in found if s.created < before.timestamp()]
        page = found[: asked.limit]
        more = len(found) > len(page)
        after = (
            {"last_created_at": iso_time(page[-1].created), "last_session_id": page[-1].id} if more else None
        )
        return reply({"sessions": [self._summary(s) for s in page], "next_cursor": after})

    def _summary(self, session: Session) -> dict[str, Any]:
        state = self.service.state
        saved = [c for c in state.checkpoints.values() if state.runs[c.run].session == session.id]
        return {
            "session_id": session.id,
            "created_at": iso_time(session.created),
            "owner": urn_of(session.tenant),
            "project_id": session.project_id or NO_PROJECT,
            "status": _status(session),
            "checkpoints_count": len(saved),
            "checkpoint_storage_bytes": sum(c.size_bytes for c in saved),
            "display_name": session.display_name,
            "user_metadata": session.user_metadata,
        }


def _status(session: Session) -> dict[str, Any] | None:
    if session.finished is None:
        return {"type": "active"}
    known = session.finished in FINISHED
    return {"type": "client_finished", "reason": {"type": session.finished}} if known else None


def _matches(session: Session, asked: m.SearchSessions) -> bool:
    """By id or by words of the name (either, if both are given), and by everything else that is given."""
    by_id = asked.session_id is not None and asked.session_id == session.id
    words = (asked.display_name or "").lower().split()
    name = (session.display_name or "").lower()
    by_name = bool(words) and all(word in name for word in words)
    if (asked.session_id is not None or words) and not (by_id or by_name):
        return False
    if asked.project_ids is not None and (session.project_id or NO_PROJECT) not in asked.project_ids:
        return False
    if asked.user_metadata.items() - session.user_metadata.items():
        return False
    return asked.statuses is None or any(_has(session, status) for status in asked.statuses)


def _has(session: Session, status: m.SearchStatus) -> bool:
    if status.type == "active":
        return session.finished is None
    if status.type == "client_finished":
        return session.finished is not None and (status.reasons is None or session.finished in status.reasons)
    return False
