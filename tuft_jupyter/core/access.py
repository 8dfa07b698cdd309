"""Who may do what: keys become principals, and every object is fetched through one ownership check.

Keys are kept as SHA-256 digests only. A foreign object and a missing one give the same answer, and a refused request
changes nothing. Whoever is being served under a key can be told when it ends. The module knows no HTTP: it is told the
key as a string; which keys exist is the affair of :mod:`~tuft_jupyter.core.keys`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from tuft_jupyter.core.errors import Forbidden, NotFound, Unauthenticated
from tuft_jupyter.core.types import Principal

TOKEN_PREFIX = "eyJ"
"""How every signed token begins, and no key of ours."""


class Owned(Protocol):
    @property
    def tenant(self) -> str: ...


T = TypeVar("T", bound=Owned)


def digest(key: str) -> str:
    """The hexadecimal SHA-256 of a key: what may be stored."""
    return hashlib.sha256(key.encode()).hexdigest()


class Grant:
    """A key that is good for now: the ``digest`` it is known by, whom it speaks for, until when (None: no end)."""

    def __init__(self, known: str, principal: Principal, expires: float | None = None) -> None:
        self.digest = known
        self.principal = principal
        self.expires = expires
        self._told: set[Callable[[], None]] = set()

    @contextlib.contextmanager
    def held(self, ended: Callable[[], None]) -> Iterator[None]:
        """Within the block, ``ended`` is called if the key is revoked or expires."""
        self._told.add(ended)
        try:
            yield
        finally:
            self._told.discard(ended)

    @property
    def busy(self) -> bool:
        return bool(self._told)

    def end(self) -> None:
        for tell in tuple(self._told):
            tell()


class KeyRing:
    """Maps API keys to principals without holding the keys.

    ``token`` tells which of some digests a signed token stands for; a token is as good as its key, and no longer.
    Grants are filed under a MAC of the digest with a secret of this process, so the time of a look-up says nothing
    about the digests that are near the one presented.
    """

    def __init__(
        self,
        token: Callable[[str, Iterable[str]], str | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._grants: dict[bytes, Grant] = {}
        self.token = token
        self._clock = clock
        self._blind = secrets.token_bytes(32)

    def add(self, key: str, principal: Principal) -> None:
        self.admit(digest(key), principal)

    def admit(self, known: str, principal: Principal, expires: float | None = None) -> None:
        """Accept the key with this digest; one that is accepted already keeps who is served under it."""
        name = self._name(known)
        grant = self._grants.get(name)
        if grant is None:
            self._grants[name] = Grant(known, principal, expires)
        else:
            grant.principal, grant.expires = principal, expires

    def revoke(self, key: str) -> None:
        self.forget(digest(key))

    def forget(self, known: str) -> None:
        """Revoke the key with this digest, and tell whoever is served under it."""
        grant = self._grants.pop(self._name(known), None)
        if grant is not None:
            grant.end()

    def expire(self) -> None:
        """Forget the keys whose time has come."""
        now = self._clock()
        for grant in list(self._grants.values()):
            if grant.expires is not None and grant.expires <= now:
                self.forget(grant.digest)

    def principal(self, key: str | None) -> Principal:
        return self.grant(key).principal

    async def presented(self, key: str | None) -> Grant:
        """As :meth:`grant`, where somebody else may have to be asked about the key first."""
        return self.grant(key)

    def serving(self, known: str) -> bool:
        """Whether a request is being served under the key with this digest."""
        grant = self._grants.get(self._name(known))
        return grant is not None and grant.busy

    def grant(self, key: str | None) -> Grant:
        """Unauthenticated without a key, Forbidden with one that is not known (any more)."""
        if not key:
            raise Unauthenticated(
                "Missing API key: send it as the X-API-Key header "
                "(the Tinker SDK does so when TINKER_API_KEY or api_key= is set)"
            )
        found = self._grants.get(self._name(digest(key)))
        if found is None and self.token is not None and key.startswith(TOKEN_PREFIX):
            known = self.token(key, [grant.digest for grant in self._grants.values()])
            found = self._grants.get(self._name(known or ""))
        if found is None or (found.expires is not None and found.expires <= self._clock()):
            raise Forbidden("Invalid API key: it is unknown to this server, revoked or expired")
        return found

    def _name(self, known: str) -> bytes:
        return hmac.digest(self._blind, known.encode(), "sha256")


def owned(principal: Principal, objects: Mapping[str, T], key: str, what: str) -> T:
    """The object under ``key`` if it is the principal's own; NotFound if it is missing or somebody else's."""
    found = objects.get(key)
    if found is None or not (principal.admin or found.tenant == principal.tenant):
        raise NotFound(f"{what} {key!r} does not exist, or belongs to somebody else")
    return found
