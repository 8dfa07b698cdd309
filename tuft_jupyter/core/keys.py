"""Keys that this server issued: made, given an end, revoked and listed, all of it on record.

The journal holds digests, never keys; the key itself is shown once, to whoever made it. Keys that the configuration
names can be listed and revoked like the others. A key's id is the beginning of its digest. The module knows no HTTP.
It keeps the :class:`~tuft_jupyter.core.access.KeyRing` in step, which has the keys that are accepted at this moment.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuft_jupyter.core.access import KeyRing, digest
from tuft_jupyter.core.errors import Forbidden, NotFound, UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.state import IssuedKey
from tuft_jupyter.core.types import Principal

PREFIX = "tml-"
"""The Tinker SDK refuses keys that begin otherwise."""
ID_LENGTH = 12
MAX_SECONDS = 10 * 365 * 86400.0
TENANT = re.compile(r"[^\s\x00-\x1f\x7f]{1,128}")


@dataclass(frozen=True, slots=True)
class Listed:
    """A key as it may be shown. ``source`` is ``issued``, ``configuration`` or ``server``; times in epoch seconds."""

    id: str
    tenant: str
    name: str
    admin: bool
    source: str
    created: float | None
    expires: float | None
    revoked: bool


class KeyBook:
    """``server`` is the server's own key, which cannot be revoked here; ``configured`` maps keys to principals."""

    def __init__(
        self,
        ledger: Ledger,
        ring: KeyRing,
        server: tuple[str, Principal],
        configured: Mapping[str, Principal],
    ) -> None:
        self.ledger = ledger
        self.ring = ring
        self._server = digest(server[0])
        self._given = {digest(key): principal for key, principal in configured.items()}
        self._given[self._server] = server[1]
        for known, principal in self._given.items():
            ring.admit(known, principal)

    def recovered(self) -> None:
        """Bring the ring to what the ledger tells, after it was opened."""
        state = self.ledger.state
        for known, key in state.keys.items():
            self.ring.admit(known, Principal(key.tenant, key.admin), key.expires)
        for known in state.revoked - {self._server}:
            self.ring.forget(known)
        self.ring.expire()

    def listed(self, principal: Principal) -> list[Listed]:
        """The principal's keys, an admin's view is everybody's; the newest first."""
        revoked = self.ledger.state.revoked
        found = [
            Listed(
                known[:ID_LENGTH], key.tenant, key.name, key.admin, "issued", key.created, key.expires,
                known in revoked,
            )
            for known, key in reversed(self.ledger.state.keys.items())
        ]  # fmt: skip
        for known, who in self._given.items():
            source = "server" if known == self._server else "configuration"
            gone = known in revoked and known != self._server
            found.append(Listed(known[:ID_LENGTH], who.tenant, "", who.admin, source, None, None, gone))
        return [key for key in found if principal.admin or key.tenant == principal.tenant]

    async def create(
        self,
        principal: Principal,
        tenant: str,
        name: str = "",
        seconds: float | None = None,
        *,
        admin: bool = False,
    ) -> tuple[str, Listed]:
        """Make a key for a tenant (admins only); returns it with what is kept of it. ``seconds`` None: no end."""
        _only_admins(principal)
        if not TENANT.fullmatch(tenant):
            raise UserError(f"tenant: {tenant!r} is no name of a tenant: 1 to 128 characters without spaces")
        if len(name) > 200:
            raise UserError(f"name: {len(name)} characters are more than 200: choose a shorter name")
        key = PREFIX + secrets.token_hex(16)
        known = digest(key)
        data = {"digest": known, "name": name, "admin": admin, "expires": self._end(seconds)}
        await self.ledger.record("key_created", tenant, {"id": known[:ID_LENGTH], **data})
        kept = self.ledger.state.keys[known]
        self.ring.admit(known, Principal(tenant, admin), kept.expires)
        return key, Listed(
            known[:ID_LENGTH], tenant, name, admin, "issued", kept.created, kept.expires, revoked=False
        )

    async def expire(self, principal: Principal, key: str, seconds: float | None) -> Listed:
        """Let an issued key end so many seconds from now, None: never (admins only)."""
        _only_admins(principal)
        known = self._find(principal, key)
        kept = self.ledger.state.keys.get(known)
        if kept is None or known in self.ledger.state.revoked:
            raise UserError(
                f"key {key!r} was not issued here or is revoked, so it cannot be changed: create a new one"
            )
        await self._record("key_changed", kept.tenant, known, {"expires": self._end(seconds)})
        if known in self.ledger.state.revoked:  # meanwhile: it did not come back
            raise UserError(f"key {key!r} was just revoked, so it cannot be changed: create a new one")
        return next(each for each in self.listed(principal) if each.id == known[:ID_LENGTH])

    async def revoke(self, principal: Principal, key: str) -> None:
        """End a key for good, by its id: one's own tenant's, and for admins anybody's."""
        await self.revoke_digest(principal, self._find(principal, key))

    async def revoke_digest(self, principal: Principal, known: str) -> None:
        if known == self._server:
            raise UserError(
                "this is the server's own key: remove $TUFT_HOME/credentials (or change TUFT_API_KEY) and restart"
            )
        if known not in self.ledger.state.revoked:
            await self._record("key_revoked", self._tenant(known) or principal.tenant, known, {})
        self.ring.forget(known)

    async def _record(self, kind: str, tenant: str, known: str, data: Mapping[str, Any]) -> None:
        """Put a change of a key on record and bring the ring to it, also if who asked for it hangs up meanwhile."""
        change = {"id": known[:ID_LENGTH], "digest": known, **data}
        recording = asyncio.ensure_future(self.ledger.record(kind, tenant, change))
        try:
            await asyncio.shield(recording)
        except asyncio.CancelledError:
            recording.add_done_callback(lambda _: self._follow(known))
            raise
        self._follow(known)

    def _follow(self, known: str) -> None:
        kept = self.ledger.state.keys.get(known)
        if known in self.ledger.state.revoked:
            self.ring.forget(known)
        elif kept is not None:
            self.ring.admit(known, Principal(kept.tenant, kept.admin), kept.expires)
            self.ring.expire()

    def _find(self, principal: Principal, key: str) -> str:
        """The digest of the key with this id; a foreign one and a missing one look the same."""
        for known in [*self.ledger.state.keys, *self._given]:
            mine = principal.admin or self._tenant(known) == principal.tenant
            if known[:ID_LENGTH] == key and mine:
                return known
        raise NotFound(f"key {key!r} does not exist, or belongs to somebody else")

    def _tenant(self, known: str) -> str | None:
        kept: IssuedKey | Principal | None = self.ledger.state.keys.get(known) or self._given.get(known)
        return kept.tenant if kept else None

    def _end(self, seconds: float | None) -> float | None:
        if seconds is None:
            return None
        if not 0 <= seconds <= MAX_SECONDS:
            raise UserError(f"ttl_seconds: {seconds} is outside 0..{MAX_SECONDS:.0f} (null: no end)")
        return self.ledger.clock() + seconds


def as_json(key: Listed) -> dict[str, Any]:
    return {name: getattr(key, name) for name in Listed.__slots__}


def _only_admins(principal: Principal) -> None:
    if not principal.admin:
        raise Forbidden(
            "only the owner of this server and its admins may make and change keys: ask one of them"
        )
