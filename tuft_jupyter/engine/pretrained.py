"""How the files of a base model are read: from this machine only, and running no code that lies beside them.

A model directory may bring Python of its own, which transformers would execute. Whether it may is decided here for
configuration, weights and tokenizer alike: by ``TUFT_TRUST_REMOTE_CODE`` in this process, which ``supervision`` sets
for each worker as the settings say for its model.
"""

from __future__ import annotations

import os

from tuft_jupyter.core.errors import UserError

TRUST = "TUFT_TRUST_REMOTE_CODE"


def reading() -> dict[str, bool]:
    """The keywords of every ``from_pretrained``."""
    return {"local_files_only": True, "trust_remote_code": os.environ.get(TRUST) == "1"}


def refusal(path: str, problem: str, error: Exception) -> UserError:
    """Why a model cannot be used, in our words where transformers would name an argument that nobody here can pass."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"base model {path!r} brings Python code of its own, which is not run: set trust_remote_code: true for "
            f"this model in the configuration (or {TRUST}=1 for all) if you have read and trust it"
        )
    return UserError(f"base model {path!r} cannot be {problem}: {error}")
