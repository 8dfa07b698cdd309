"""Who may do what: keys become principals, and every object is fetched through one ownership check.

Keys are kept as SHA-256 digests only. A foreign object and a missing one give the same answer, and a refused request
changes nothing. The module knows no HTTP: it is told the key as a string.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
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


class KeyRing:
    """Maps API keys to principals without holding the keys.

    ``token`` tells which of some digests a signed token stands for; a token is as good as its key, and no longer.
    """

    def __init__(self, token: Callable[[str, Iterable[str]], str | None] | None = None) -> None:
        self._principals: dict[str, Principal] = {}
        self._token = token

    def add(self, key: str, principal: Principal) -> None:
        self._principals[digest(key)] = principal

    def revoke(self, key: str) -> None:
        self.forget(digest(key))

    def forget(self, known: str) -> None:
        """Revoke the key with this digest."""
        self._principals.pop(known, None)

    def principal(self, key: str | None) -> Principal:
        """Unauthenticated without a key, Forbidden with one that is not known (any more)."""
        if not key:
            raise Unauthenticated(
                "Missing API key: send it as the X-API-Key header "
                "(the Tinker SDK does so when TINKER_API_KEY or api_key= is set)"
            )
        found = None
        presented = digest(key)
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, presented):
                found = principal
        if found is None and self._token is not None and key.startswith(TOKEN_PREFIX):
            found = self._principals.get(self._token(key, tuple(self._principals)) or "")
        if found is None:
            raise Forbidden("Invalid API key: it is unknown to this server, revoked or expired")
        return found


def owned(principal: Principal, objects: Mapping[str, T], key: str, what: str) -> T:
    """The object under ``key`` if it is the principal's own; NotFound if it is missing or somebody else's."""
    found = objects.get(key)
    if found is None or not (principal.admin or found.tenant == principal.tenant):
        raise NotFound(f"{what} {key!r} does not exist, or belongs to somebody else")
    return found
