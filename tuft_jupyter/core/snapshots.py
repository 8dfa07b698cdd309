"""Snapshots: when a run is to be written to disk, so that replay can start there, and which directory it goes to.

Each run has a directory of its own. Whatever lies in it beside the snapshot on record, such as one that was cut short,
goes with the next one, and everything when the run is closed. The module neither writes nor reads adapters: the driver
has the worker do that, and the journal says what counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SnapshotRule:
    """A run is written to disk after this many steps, or this many seconds after its last snapshot."""

    steps: int = 20
    seconds: float = 30.0


class Snapshots:
    """Those of one base model's runs, below ``root``. ``clock`` gives seconds."""

    def __init__(self, root: Path, rule: SnapshotRule, clock: Callable[[], float]) -> None:
        self.root = root
        self.rule = rule
        self._clock = clock
        self._steps: dict[str, int] = {}
        self._written: dict[str, float] = {}

    def stepped(self, run: str, steps: int = 1) -> None:
        """So many more steps would have to be replayed."""
        self._steps[run] = self._steps.get(run, 0) + steps

    def hurry(self, run: str) -> None:
        """Write the run at the next opportunity: what it was loaded from may be deleted."""
        self._steps[run] = self.rule.steps

    def due(self, run: str) -> bool:
        now = self._clock()
        last = self._written.setdefault(run, now)
        return self._steps.get(run, 0) >= self.rule.steps or now - last >= self.rule.seconds

    def place(self, run: str) -> Path:
        """A new directory for a snapshot that is about to be written; also if that fails, the next one is not due."""
        self._written[run], self._steps[run] = self._clock(), 0
        return self._home(run) / uuid.uuid4().hex

    async def keep(self, run: str, directory: Path, before: str | None) -> None:
        """``directory`` is on record now, in the place of ``before``: remove all others of the run."""
        old = {path for path in self._home(run).iterdir() if path != directory}
        await _remove(old | ({Path(before)} if before else set()))

    async def remove(self, run: str, last: str | None) -> None:
        """Remove all of a run's, ``last`` among them."""
        self.forget(run)
        await _remove({self._home(run)} | ({Path(last)} if last else set()))

    def forget(self, run: str) -> None:
        """Keep nothing of it in memory; its files stay."""
        self._steps.pop(run, None)
        self._written.pop(run, None)

    def _home(self, run: str) -> Path:
        return self.root / hashlib.sha256(run.encode()).hexdigest()[:32]


async def _remove(directories: set[Path]) -> None:
    for directory in directories:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
