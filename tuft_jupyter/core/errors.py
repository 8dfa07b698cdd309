"""Every way a request can fail, and how each failure looks on the wire.

::

    TuftError
    ├── UserError            400, category "user": the request is wrong and says how to mend it
    │   ├── DatumError       400: one datum of the request is wrong, counted over the whole request
    │   ├── NotFound         404: missing, or somebody else's (the two look the same)
    │   ├── Unauthenticated  401: no key
    │   ├── Forbidden        403: a key that is unknown, revoked or expired
    │   ├── TooLarge         413: over a size limit
    │   ├── UnsupportedMedia 415: a body in a form we do not read
    │   └── NotOffered       404: part of the protocol, not offered by this server (the SDK retries a 501)
    ├── Elsewhere            307 with Location: another server serves what this one was asked for
    ├── Overloaded           429 with Retry-After: a limit is reached for now
    ├── Lost                 410: the promise is gone (a sample before a restart); ask again
    └── ServerError          500, category "server": our fault; the message never carries a traceback
        └── Unobtainable     500: what an engine needs is not to be had, however often it is tried

The Tinker SDK retries 402, 409, 5xx and an empty 400 for minutes, so none of those is ever used for something
that will not get better. A failure found after submission travels as ``{"error", "category"}`` with status 200.
"""

from __future__ import annotations


class TuftError(Exception):
    """A failure with a status for HTTP and a category for promises."""

    status = 500
    category = "server"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UserError(TuftError):
    status = 400
    category = "user"


class DatumError(UserError):
    """One datum of a request is at fault; ``datum`` counts from 0 over the request."""

    def __init__(self, datum: int, problem: str) -> None:
        super().__init__(f"datum {datum}: {problem}")
        self.datum, self.problem = datum, problem

    def after(self, datums: int) -> DatumError:
        """The same, where what was looked at began after so many datums of the request."""
        return DatumError(self.datum + datums, self.problem)


class NotFound(UserError):
    status = 404


class Unauthenticated(UserError):
    status = 401


class Forbidden(UserError):
    status = 403


class TooLarge(UserError):
    status = 413


class UnsupportedMedia(UserError):
    status = 415


class NotOffered(UserError):
    status = 404


class Elsewhere(TuftError):
    """``address`` is that server's, without a slash at the end."""

    status = 307
    category = "server"

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address


class Overloaded(TuftError):
    status = 429
    category = "server"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Lost(TuftError):
    status = 410
    category = "server"


class ServerError(TuftError):
    status = 500
    category = "server"


class Unobtainable(ServerError):
    """It was waited for as long as was asked, so nobody tries again until somebody asks again."""


def failure(category: str, message: str) -> TuftError:
    """Rebuild an error that crossed a process boundary as (category, message)."""
    return UserError(message) if category == "user" else ServerError(message)
