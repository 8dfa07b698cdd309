"""Sessions: connected clients, from their first request until they finish.

A heartbeat is a fact of this process only and is not journaled; after a restart every session counts as just seen.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.state import Session
from tuft_jupyter.core.types import Principal


class Sessions:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._seen: dict[str, float] = {}

    async def open(self, principal: Principal, details: Mapping[str, Any]) -> str:
        """Open a session; returns its id."""
        session = str(uuid.uuid4())
        await self.ledger.record("session_opened", principal.tenant, {"session": session, **details})
        self._seen[session] = self.ledger.clock()
        return session

    def get(self, principal: Principal, session: str) -> Session:
        return owned(principal, self.ledger.state.sessions, session, "session")

    def live(self, principal: Principal, session: str) -> Session:
        """A session that was not finished; UserError otherwise."""
        found = self.get(principal, session)
        if found.finished is not None:
            raise UserError(f"session {session!r} is finished ({found.finished}): open a new ServiceClient")
        return found

    def mine(self, principal: Principal) -> list[Session]:
        """The principal's sessions, newest first."""
        found = [s for s in self.ledger.state.sessions.values() if s.tenant == principal.tenant]
        return sorted(found, key=lambda s: s.created, reverse=True)

    async def assign(self, principal: Principal, session: str, project: str) -> None:
        """Put a session under a project's name, which is kept and shown, and gives no rights."""
        found = self.get(principal, session)
        if found.project_id != project:
            await self.ledger.record(
                "session_changed", found.tenant, {"session": session, "project_id": project}
            )

    def heartbeat(self, principal: Principal, session: str) -> None:
        self._seen[self.get(principal, session).id] = self.ledger.clock()

    def last_seen(self, session: str) -> float:
        """When the session was last heard of, in seconds since the epoch."""
        return self._seen.setdefault(session, self.ledger.clock())

    async def finish(self, session: Session, reason: str, detail: str | None) -> None:
        """End a session; the first reason wins."""
        if session.finished is None:
            data = {"session": session.id, "reason": reason, "detail": detail}
            await self.ledger.record("session_finished", session.tenant, data)
