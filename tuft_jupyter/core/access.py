"""Who may do what: keys become principals, and every object is fetched through one ownership check.

Keys are kept as SHA-256 digests only. A foreign object and a missing one give the same answer, and a refused request
changes nothing. A request that is being served is notified when its key ends. The module knows no HTTP: it is given
the key as a string; which keys exist is decided by :mod:`~tuft_jupyter.core.keys`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from tuft_jupyter.core.errors import Forbidden, NotFound, Overloaded, TuftError, Unauthenticated
from tuft_jupyter.core.types import Principal

TOKEN_PREFIX = "eyJ"
"""How every signed token begins, and no key of ours."""


class Owned(Protocol):
    @property
    def tenant(self) -> str: ...


T = TypeVar("T", bound=Owned)

OnEnd = Callable[[TuftError], None]
"""Told why what is being served ends."""


def digest(key: str) -> str:
    """The hexadecimal SHA-256 of a key: what may be stored."""
    return hashlib.sha256(key.encode()).hexdigest()


class ActiveKey:
    """A key that is accepted: the ``digest`` it is known by, whom it speaks for, until when (None: no end)."""

    def __init__(self, known: str, principal: Principal, expires: float | None = None) -> None:
        self.digest = known
        self.principal = principal
        self.expires = expires
        self._listeners: set[OnEnd] = set()

    @contextlib.contextmanager
    def in_use(self, on_end: OnEnd) -> Iterator[None]:
        """Within the block, ``on_end`` is called if the key is revoked or expires, or may do less than before."""
        self._listeners.add(on_end)
        try:
            yield
        finally:
            self._listeners.discard(on_end)

    @property
    def busy(self) -> bool:
        return bool(self._listeners)

    def end(self, why: TuftError) -> None:
        for on_end in tuple(self._listeners):
            on_end(why)


class KeyRing:
    """Maps API keys to principals without holding the keys.

    ``token`` tells which of some digests a signed token stands for; a token is as good as its key, and no longer.
    Keys are filed under a MAC of the digest with a secret of this process, so the time of a look-up says nothing
    about the digests that are near the one presented.
    """

    def __init__(
        self,
        token: Callable[[str, Iterable[str]], str | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._active: dict[bytes, ActiveKey] = {}
        self.token = token
        self.clock = clock
        self._blind = secrets.token_bytes(32)

    def add(self, key: str, principal: Principal) -> None:
        self.admit(digest(key), principal)

    def admit(self, known: str, principal: Principal, expires: float | None = None) -> None:
        """Accept the key with this digest.

        One that is accepted already keeps who is served under it, unless it speaks for somebody else from now on, or
        for an admin no longer: then what is being served was granted to another, and has to be asked for again.
        """
        name = self._name(known)
        found = self._active.get(name)
        if found is None:
            self._active[name] = ActiveKey(known, principal, expires)
        else:
            was, found.principal, found.expires = found.principal, principal, expires
            if was.tenant != principal.tenant or (was.admin and not principal.admin):
                found.end(Overloaded("what this API key may do has changed: ask again"))

    def revoke(self, key: str) -> None:
        self.forget(digest(key))

    def forget(self, known: str) -> None:
        """Revoke the key with this digest, and tell whoever is served under it."""
        found = self._active.pop(self._name(known), None)
        if found is not None:
            found.end(Forbidden("Invalid API key: it was revoked or expired"))

    def expire(self) -> None:
        """Forget the keys whose time has come."""
        now = self.clock()
        for found in list(self._active.values()):
            if found.expires is not None and found.expires <= now:
                self.forget(found.digest)

    def principal(self, key: str | None) -> Principal:
        return self.active(key).principal

    async def authenticate(self, key: str | None) -> ActiveKey:
        """As :meth:`active`, where somebody else may have to be asked about the key first."""
        return self.active(key)

    def serving(self, known: str) -> bool:
        """Whether a request is being served under the key with this digest."""
        found = self._active.get(self._name(known))
        return found is not None and found.busy

    def active(self, key: str | None) -> ActiveKey:
        """Unauthenticated without a key, Forbidden with one that is not known (any more)."""
        if not key:
            raise Unauthenticated(
                "Missing API key: send it as the X-API-Key header "
                "(the Tinker SDK does so when TINKER_API_KEY or api_key= is set)"
            )
        found = self._active.get(self._name(digest(key)))
        if found is None and self.token is not None and key.startswith(TOKEN_PREFIX):
            known = self.token(key, [one.digest for one in self._active.values()])
            found = self._active.get(self._name(known or ""))
        if found is None or (found.expires is not None and found.expires <= self.clock()):
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
