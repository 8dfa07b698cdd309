"""How long what is over stays on record: sessions that ended, their samplers, runs of which nothing is left.

After ``Limits.history`` seconds it is forgotten, so that a server's memory, its journal and its panel hold what it did
lately and not all it ever did. Promises: what somebody can still go on with stays (a run that can be resumed, a run
with a checkpoint, a sampler of a connected client, and the sessions of these), and so does what was used, by the hour.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from tuft_jupyter.core.ephemeral import Ephemeral
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Limits
from tuft_jupyter.core.sessions import Sessions
from tuft_jupyter.core.state import ENDED, Run, Sampler, Session

AT_ONCE = 1000
"""Objects forgotten with one record."""
SILENT = "silent"
"""How a session ends whose client never said that it was leaving."""


class History:
    def __init__(self, ledger: Ledger, sessions: Sessions, ephemeral: Ephemeral, limits: Limits) -> None:
        self.ledger = ledger
        self.sessions = sessions
        self.ephemeral = ephemeral
        self.limits = limits

    async def forget(self, now: float) -> tuple[list[Run], list[Sampler]]:
        """Forget what is over for long enough; returns the runs and samplers that left."""
        if not self.limits.history:
            return [], []
        state, before = self.ledger.state, now - self.limits.history
        saved = {checkpoint.run for checkpoint in state.checkpoints.values()}
        runs = [
            run
            for run in state.runs.values()
            if run.status in ENDED and not run.pending and run.last_request < before and run.id not in saved
        ]
        ended = {
            session.id
            for session in state.sessions.values()
            if session.created < before and self.sessions.over(session, now)
        }
        spent = self.ephemeral.spent(now)
        samplers = [
            sampler
            for sampler in state.samplers.values()
            if sampler.created < before and (sampler.session in ended or sampler.directory in spent)
        ]
        await self._record(runs, samplers, ())
        used = {run.session for run in state.runs.values()} | {s.session for s in state.samplers.values()}
        over = [state.sessions[name] for name in ended - used]
        finished = [session for session in over if session.finished is not None]
        for session in over:  # those that are silent next time: nothing may begin in one that leaves
            await self.sessions.finish(session, SILENT, None)
        await self._record((), (), finished)
        for session in finished:
            self.sessions.forget(session)
        return runs, samplers

    async def _record(
        self, runs: Iterable[Run], samplers: Iterable[Sampler], sessions: Iterable[Session]
    ) -> None:
        """By tenant: nobody hears of another's."""
        over: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for kind, objects in (("runs", runs), ("samplers", samplers), ("sessions", sessions)):
            for each in objects:
                over[each.tenant].append((kind, each.id))
        for tenant, gone in over.items():
            for start in range(0, len(gone), AT_ONCE):
                part = gone[start : start + AT_ONCE]
                kinds = ("runs", "samplers", "sessions")
                data = {kind: [name for of, name in part if of == kind] for kind in kinds}
                await self.ledger.record("forgotten", tenant, data)
