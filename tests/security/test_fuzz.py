"""Hostile requests by the hundred; by the ten thousand with ``make security``."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.fuzz import KINDS, campaign

TRIALS = int(os.environ.get("TUFT_FUZZ_TRIALS", "400"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_no_request_breaks_hangs_or_disturbs_the_server(kind: str) -> None:
    """P3, H1, H2: no 5xx, 402 or 409, nothing over two seconds, no traceback or NaN; a bystander's loss stays."""
    (findings,) = asyncio.run(campaign({kind: KINDS[kind]}, TRIALS, seed=7)).values()
    assert findings.cases == TRIALS
    assert findings.found == []
    assert (
        sum(n for status, n in findings.statuses.items() if status < 400) > TRIALS / 10
    )  # it also gets through
    assert sum(n for status, n in findings.statuses.items() if status >= 400) > TRIALS / 10
