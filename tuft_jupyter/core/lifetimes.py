"""Idle timeouts and longest lifetimes: how long a run may stay in a worker, and how long it may train.

A run without a heartbeat of its session and without a request for ``idle_timeout`` seconds leaves the worker; its state
is on disk, it comes back with its next request, and until then it takes nobody's place. A run past ``max_lifetime`` is
saved as a training checkpoint and closed, whether it is in use or not; ``owner``, whose server it is, is not bound by
that. The module only decides; it stops nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Limits
from tuft_jupyter.core.sessions import Sessions
from tuft_jupyter.core.state import Run
from tuft_jupyter.core.types import CheckpointKind, checkpoint_path

LAST_CHECKPOINT = "lifetime"
"""The name of the checkpoint that a run leaves when its time is over."""
WARNING = 0.1
"""The part of its lifetime before the end of a run in which its owner is warned."""


class Lifetimes:
    def __init__(self, ledger: Ledger, sessions: Sessions, limits: Limits) -> None:
        self.ledger = ledger
        self.sessions = sessions
        self.limits = limits

    def idle(self, run: Run, now: float) -> bool:
        """Whether nobody has used the run for so long that it may leave the worker."""
        if run.pending:
            return False
        seen = max(run.last_request, self.sessions.last_seen(run.session))
        return now - seen > self.limits.idle_timeout

    def in_use(self, now: float) -> Iterator[tuple[str, str, str]]:
        """(run, tenant, base model) of every run that takes a place."""
        sessions = self.ledger.state.sessions
        for run in self.ledger.state.runs.values():
            opened = run.status in ("creating", "ready") and sessions[run.session].finished is None
            if opened and not self.idle(run, now):
                yield run.id, run.tenant, run.base_model

    def end(self, run: Run) -> float | None:
        """When the run's lifetime is over, in seconds since the epoch; None: never."""
        if not self.limits.max_lifetime or run.tenant == self.limits.owner:
            return None
        return run.created + self.limits.max_lifetime

    def over(self, now: float) -> list[Run]:
        """Runs that are to be saved and closed now."""
        return [run for run in self._open() if (self.end(run) or now) < now]

    def ending(self, tenant: str, now: float) -> list[dict[str, float | str]]:
        """What a tenant is warned of: its runs that end soon, with the seconds left."""
        soon = self.limits.max_lifetime * WARNING
        ends = [(run, self.end(run)) for run in self._open() if run.tenant == tenant]
        return [
            {"run": run.id, "seconds_left": round(max(end - now, 0.0), 1)}
            for run, end in ends
            if end is not None and end - now < soon
        ]

    def check(self, run: Run) -> None:
        """UserError if the run's time is over; it says where its weights are."""
        end = self.end(run)
        if end is not None and end < self.ledger.clock():
            saved = checkpoint_path(run.id, CheckpointKind.TRAINING, LAST_CHECKPOINT)
            raise UserError(
                f"model {run.id!r} reached the longest lifetime on this server "
                f"({self.limits.max_lifetime:g} s, adapter_max_lifetime) and was closed: "
                f"go on from its last checkpoint, {saved}"
            )

    def _open(self) -> Iterator[Run]:
        return (run for run in self.ledger.state.runs.values() if run.status == "ready")
