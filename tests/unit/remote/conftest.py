"""Servers elsewhere are looked for without pauses."""

from __future__ import annotations

import pytest

from tuft_jupyter.engine.remote import http


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", (0.01, None))
