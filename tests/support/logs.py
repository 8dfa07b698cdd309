"""What the code under test wrote into the log; other libraries may be writing, too."""

from __future__ import annotations

import logging

import pytest


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[str]:
    """Ours from ``level`` on, in their order."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("tuft_jupyter") and record.levelno >= level
    ]
