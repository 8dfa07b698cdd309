"""Bringing an engine up: what cannot succeed fails at once, what may succeed later is tried again.

A wrong model stays wrong; a machine that was too busy, or a worker that died while it loaded, may do better next time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import ServerError, Unobtainable, UserError

log = logging.getLogger("tuft_jupyter.startup")

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries."""


class Startable(Protocol):
    on_progress: Callable[[str], None]

    async def start(self) -> None: ...


async def bring_up(engine: Startable, name: str, say: Callable[[str], None]) -> None:
    """Start an engine. ``say`` is told what is being done; UserError or ServerError if it cannot be brought up."""
    engine.on_progress = lambda step: say(f"loading {name}: {step}")
    for pause in (*PAUSES, None):
        say(f"loading {name}")
        try:
            await engine.start()
        except (UserError, Unobtainable):
            raise
        except Exception as error:
            # Whatever it is: a driver that dies of it would park every client for ever.
            foreseen = isinstance(error, (ServerError, EngineDied))
            why = str(error) if foreseen else f"{type(error).__name__}: {error}"
            log.error("%s cannot be loaded: %s", name, why, exc_info=not foreseen)
            if pause is None:
                raise ServerError(f"{why} (tried {len(PAUSES) + 1} times)") from None
            say(f"trying again to load {name}: {why}")
            await asyncio.sleep(pause)
        else:
            return
