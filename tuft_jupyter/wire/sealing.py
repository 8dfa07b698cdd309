"""Encryption of exports with age (age-encryption.org/v1), for recipients that the client names.

``pyrage`` comes with the ``backend`` extra and is imported when first needed; without it, recipients are refused by
name. Promises: a file appears encrypted and whole or not at all, and its plain form is gone once it has.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuft_jupyter.core.errors import NotFound, UserError

SUFFIX = ".age"
MAX_RECIPIENTS = 16
_one_at_a_time = threading.Lock()


def check(recipients: Sequence[str]) -> None:
    """UserError naming the recipient that is none, or what is missing to encrypt at all."""
    if len(recipients) > MAX_RECIPIENTS:
        raise UserError(
            f"age_encryption_recipients: {len(recipients)} are given, {MAX_RECIPIENTS} are possible"
        )
    _parsed(recipients)


def seal(directory: Path, names: Sequence[str], recipients: Sequence[str]) -> list[str]:
    """Encrypt those files in place, where that was not done before; returns their new names. It blocks."""
    parsed = _parsed(recipients)
    with _one_at_a_time:
        for name in names:
            plain, sealed = directory / name, directory / (name + SUFFIX)
            if not sealed.exists():
                if not plain.exists():
                    raise NotFound(
                        f"the export has no file {name!r}: it was deleted, or never written; save it again"
                    )
                fresh = directory / f".{name}-{secrets.token_hex(4)}"
                try:
                    _pyrage().encrypt_file(str(plain), str(fresh), parsed)
                    fresh.replace(sealed)
                finally:
                    fresh.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)
    return [name + SUFFIX for name in names]


def _parsed(recipients: Sequence[str]) -> list[Any]:
    if not recipients:
        return []
    age = _pyrage()
    found = []
    for recipient in recipients:
        kind = age.ssh if recipient.startswith("ssh-") else age.x25519
        try:
            found.append(kind.Recipient.from_str(recipient))
        except age.RecipientError as error:
            raise UserError(
                f"age_encryption_recipients: {recipient[:80]!r} is neither an age recipient (age1...) nor an SSH "
                f"public key: {error}"
            ) from None
    return found


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise UserError(
            "age_encryption_recipients: this server has nothing to encrypt with; have pyrage installed there "
            "(pip install pyrage), or export without recipients"
        ) from None
    return pyrage
