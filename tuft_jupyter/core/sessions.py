"""Sessions: connected clients, from their first request until they finish.

A heartbeat is a fact of this process only and is not journaled; after a restart every session counts as just seen.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Limits, Quotas
from tuft_jupyter.core.state import Session
from tuft_jupyter.core.types import Principal

LEAST_SILENCE = 30.0
"""Seconds after which a session may at the earliest be gone: the SDK lets ten pass between two heartbeats."""


class Sessions:
    def __init__(self, ledger: Ledger, limits: Limits | None = None, quotas: Quotas | None = None) -> None:
        self.ledger = ledger
        self._silence = max((limits or Limits()).idle_timeout, LEAST_SILENCE)
        self._quotas = quotas or Quotas()
        self._seen: dict[str, float] = {}
        self._opening: Counter[str] = Counter()  # by tenant

    async def open(self, principal: Principal, details: Mapping[str, Any]) -> str:
        """Open a session; returns its id. UserError if the tenant has as many as it may."""
        tenant = principal.tenant
        if self._quotas.of(tenant).sessions:
            self._quotas.check_sessions(tenant, self._connected(tenant) + self._opening[tenant])
        session = str(uuid.uuid4())
        self._opening[tenant] += 1
        try:
            await self.ledger.record("session_opened", tenant, {"session": session, **details})
        finally:
            self._opening[tenant] -= 1
            if not self._opening[tenant]:
                del self._opening[tenant]
        self._seen[session] = self.ledger.clock()
        return session

    def _connected(self, tenant: str) -> int:
        now, sessions = self.ledger.clock(), self.ledger.state.sessions.values()
        return sum(1 for each in sessions if each.tenant == tenant and not self.over(each, now))

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

    def listen_again(self) -> None:
        """Every session counts as just seen, as after a restart."""
        self._seen.clear()

    def over(self, session: Session, now: float) -> bool:
        """Whether it was finished, or has fallen silent: then its client is gone, or asleep."""
        return session.finished is not None or now - self.last_seen(session.id) > self._silence

    def forget(self, session: Session) -> None:
        """Keep nothing of a session that left the record."""
        self._seen.pop(session.id, None)

    async def finish(self, session: Session, reason: str, detail: str | None) -> None:
        """End a session; the first reason wins."""
        if session.finished is None:
            data = {"session": session.id, "reason": reason, "detail": detail}
            await self.ledger.record("session_finished", session.tenant, data)
