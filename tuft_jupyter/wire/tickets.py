"""Signed statements: addresses that carry their own permission, and short-lived tokens that stand for a key.

Both are JSON Web Tokens (RFC 7519, HS256) under a secret that stays on this machine. A ticket lets whoever holds it
fetch one file of one saved checkpoint until it expires; a token lets its holder act as the key it was made from. The
module knows neither HTTP nor what a checkpoint holds. Promises: what was not signed here, has expired, or was signed
for the other purpose is refused.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from tuft_jupyter.core.errors import Forbidden

ALGORITHM = "HS256"
ISSUER = "passport-tuft"
"""The SDK reads its identity from tokens whose issuer begins so."""

TOKEN_SECONDS = 3600
TICKET_SECONDS = 3600
"""How long an address to download from is good for: the SDK asks for a new one in its last five minutes."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """``version`` tells a checkpoint from one that was saved later under the same path; ``file`` "" is an archive."""

    path: str
    version: str
    file: str = ""


class Tickets:
    def __init__(self, secret: str) -> None:
        self._secret = secret

    def issue(self, ticket: Ticket) -> tuple[str, float]:
        """(the signed ticket, when it expires in seconds since the epoch)."""
        claims = {"path": ticket.path, "version": ticket.version, "file": ticket.file}
        return self._sign("download", claims, TICKET_SECONDS)

    def read(self, signed: str) -> Ticket:
        """Forbidden unless it was issued here and is still good."""
        claims = self._claims("download", signed, "this address")
        return Ticket(claims["path"], claims["version"], claims["file"])

    def token(self, credential: str, subject: str, organization: str) -> str:
        """A token for the key with that digest; the claims are those that the SDK shows as its identity."""
        claims = {"sub": subject, "org_id": organization, "email": "", "iss": ISSUER}
        return self._sign("api", {**claims, "key": self._name(credential)}, TOKEN_SECONDS)[0]

    def credential(self, token: str, known: Iterable[str]) -> str | None:
        """Which of the known digests a token stands for; Forbidden if it is none of ours or has expired."""
        claims = self._claims("api", token, "this token")
        return next((one for one in known if hmac.compare_digest(self._name(one), str(claims["key"]))), None)

    def _name(self, credential: str) -> str:
        """A name for a digest that says nothing about it to anybody without the secret."""
        return hmac.new(self._secret.encode(), credential.encode(), "sha256").hexdigest()[:32]

    def _sign(self, purpose: str, claims: Mapping[str, Any], seconds: float) -> tuple[str, float]:
        now = int(time.time())
        timed = {**claims, "aud": purpose, "iat": now, "exp": now + int(seconds)}
        return jwt.encode(timed, self._secret, ALGORITHM), float(timed["exp"])

    def _claims(self, purpose: str, signed: str, what: str) -> dict[str, Any]:
        try:
            return jwt.decode(
                signed,
                self._secret,
                [ALGORITHM],
                audience=purpose,
                options={"require": ["exp", "iat", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise Forbidden(f"{what} has expired: ask for a new one") from None
        except jwt.InvalidTokenError:
            raise Forbidden(f"{what} was not signed by this server, or was changed") from None
