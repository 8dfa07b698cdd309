"""Weights that were saved for one sampler, without a name: which of them stay on disk.

A reinforcement-learning loop saves some at every step and samples from the newest. So those of connected sessions stay,
the newest few of each, and no more altogether than their tenant may keep; the rest may go.
"""

from __future__ import annotations

from collections import defaultdict

from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Limits, Quotas
from tuft_jupyter.core.sessions import Sessions
from tuft_jupyter.core.state import Sampler, Session


class Ephemeral:
    def __init__(self, ledger: Ledger, sessions: Sessions, limits: Limits, quotas: Quotas) -> None:
        self.ledger = ledger
        self.sessions = sessions
        self.limits = limits
        self.quotas = quotas

    def check(self, session: Session) -> None:
        """UserError if there is no room for weights of a session that has none yet."""
        if self.quotas.of(session.tenant).samplers:
            kept = self._kept(self.ledger.clock(), session.tenant)
            if session.id not in kept:
                self.quotas.check_samplers(session.tenant, sum(map(len, kept.values())))

    def spent(self, now: float) -> set[str]:
        """Directories of weights that nobody will sample from any more."""
        stay = {sampler.directory for kept in self._kept(now).values() for sampler in kept}
        samplers = self.ledger.state.samplers.values()
        return {s.directory for s in samplers if s.model_path is None and s.directory is not None} - stay

    def _kept(self, now: float, tenant: str | None = None) -> dict[str, list[Sampler]]:
        """By session, the oldest first: those that stay, of one tenant or of all."""
        state = self.ledger.state
        found: defaultdict[str, list[Sampler]] = defaultdict(list)
        for sampler in state.samplers.values():
            nameless = sampler.model_path is None and sampler.directory is not None
            if nameless and tenant in (None, sampler.tenant):
                found[sampler.session].append(sampler)
        by_tenant: defaultdict[str, list[list[Sampler]]] = defaultdict(list)
        kept = {}
        for session, samplers in found.items():
            if not self.sessions.over(state.sessions[session], now):
                kept[session] = samplers[-self.limits.ephemeral_per_session :]
                by_tenant[samplers[0].tenant].append(kept[session])
        for owner, sessions in by_tenant.items():
            allowed = self.quotas.of(owner).samplers
            while allowed and sum(map(len, sessions)) > allowed:
                max(sessions, key=len).pop(0)
        return kept
