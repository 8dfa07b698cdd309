"""What was sampled, added up by hour, session and base model until it is put on record.

A record for every sample would cost more than a small sample does. So :meth:`SamplingUsage.flush` is called now and
then, before usage is read, and at the end; after a crash at most what came since the last call is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.usage import hour_of


@dataclass(slots=True)
class _Sum:
    prompt_tokens: int = 0
    tokens: int = 0


class SamplingUsage:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sums: dict[tuple[str, str, str, float], _Sum] = {}
        self._flushing = asyncio.Lock()

    def add(self, tenant: str, session: str, base_model: str, facts: Mapping[str, Any]) -> None:
        """Count an answered request; ``facts`` are its outcome's. ``session`` is "" for requests without one."""
        found = self._sums.setdefault((tenant, session, base_model, hour_of(self._ledger.clock())), _Sum())
        found.prompt_tokens += facts.get("prompt_tokens", 0)
        found.tokens += facts.get("tokens", 0)

    async def flush(self) -> None:
        """Put on record what was counted; while the journal takes nothing, it is kept for the next call.

        What another call is putting there is on record as well when this one returns.
        """
        async with self._flushing:
            for key in list(self._sums):
                await self._record(key, self._sums.pop(key))

    async def _record(self, key: tuple[str, str, str, float], sums: _Sum) -> None:
        tenant, session, base_model, hour = key
        data = {
            "session": session,
            "base_model": base_model,
            "hour": hour,
            "prompt_tokens": sums.prompt_tokens,
            "tokens": sums.tokens,
        }
        try:
            await self._ledger.record("sampled", tenant, data)
        except Overloaded:
            again = self._sums.setdefault(key, _Sum())
            again.prompt_tokens += sums.prompt_tokens
            again.tokens += sums.tokens
