"""Replay: bring a run back into a worker as the journal tells it: its last snapshot, then every op since, in order.

An op is replayed as it first ran, cut into the same parts, so that sums come out with the same rounding. The module
knows neither lanes nor why the run had left.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from tuft_jupyter.core.engine import Task, TrainingEngine
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.state import Run
from tuft_jupyter.core.types import Op, OpKind

log = logging.getLogger("tuft_jupyter.driver")


class CannotReplay(Exception):
    """What the journal tells cannot be done again; the message says why."""


async def replay(run: Run, engine: TrainingEngine, ledger: Ledger, grant: int) -> None:
    """Return when the engine holds the run as it was; ``grant`` tokens are worked on in each step.

    CannotReplay or TuftError if that is not possible, EngineDied if the worker goes away meanwhile.
    """
    if run.snapshot is not None:
        args = {"directory": run.snapshot, "optimizer": True}
        await _do(Task("restore", run.id, OpKind.LOAD_WEIGHTS, args), engine)
    for record in run.replay:
        op = await _read(record, ledger)
        await _do(Task(op.request_id, op.run, op.kind, op.args, op.body, op.content_type, grant), engine)


async def _read(record: int, ledger: Ledger) -> Op:
    """An op out of the journal; while that does not answer, wait: the run is not at fault."""
    while True:
        try:
            return await ledger.op(record)
        except Overloaded as silent:
            log.error("waiting to read record %d: %s", record, silent)
            await asyncio.sleep(silent.retry_after)


async def _do(task: Task, engine: TrainingEngine) -> None:
    while True:
        (outcome,) = await engine.step([task])
        if outcome.category:
            raise CannotReplay(outcome.error)
        if outcome.finished:
            return
        task = replace(task, body=b"")  # the worker remembers where it stopped
