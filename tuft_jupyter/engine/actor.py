"""One worker process, as the event loop knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import psutil

from tuft_jupyter.engine.ray_actors import Loaded
from tuft_jupyter.engine.ray_runtime import Session


@dataclass(eq=False)
class Actor:
    """A Ray actor. ``gone`` is done, with the reason, once it cannot answer any more; ``pid`` is 0 before it runs.

    ``process`` is there if it runs on this machine.
    """

    handle: Any
    session: Session
    gone: asyncio.Future[str]
    pid: int = 0
    process: psutil.Process | None = None
    loaded: Loaded | None = None
    gpu_bytes: int = 0

    @property
    def alive(self) -> bool:
        """As far as can be seen without asking it."""
        if self.gone.done():
            return False
        try:
            return self.process is None or self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def leave(self, reason: str) -> None:
        """It cannot answer any more; the first reason holds."""
        if not self.gone.done():
            self.gone.set_result(reason)
