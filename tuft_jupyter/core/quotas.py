"""What each tenant may use: how fast it may ask, how much at once, how many runs, how many bytes of checkpoints.

Limits hold per tenant, however many keys and sessions it has. Rates are paced, not refused: a request that comes too
soon waits its turn, and only one that would wait longer than :data:`HOLD` seconds is answered "later" (429 with
Retry-After, which the SDK follows). What cannot become possible by waiting is a user's error with the way out in it.
The module knows neither requests nor state: it gets numbers, and the time from its clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from tuft_jupyter.core.errors import Overloaded, UserError

HOLD = 10.0
"""Seconds a request is held at most before it is sent away to come back later."""
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants altogether. Tokens count model input tokens; times are seconds, 0 means no end.

    ``batch_tokens`` and ``shared_batch_tokens`` are the parts in which passes are worked off, alone and beside other
    tenants, on an engine that does not say what suits it. ``owner`` is the tenant whose server it is: the lifetime of
    runs does not bind it. ``custom_loss``: whether losses that users wrote are computed here. ``history`` is how long
    what is over stays on record.
    """

    max_rank: int = 64
    queued_ops_per_tenant: int = 4096
    queued_bytes_per_tenant: int = 2**30
    batch_tokens: int = 512
    shared_batch_tokens: int = 256
    idle_timeout: float = 1800.0
    max_lifetime: float = 0.0
    owner: str = ""
    ephemeral_per_session: int = 32
    history: float = 30 * 86400.0
    custom_loss: bool = False


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of one tenant; 0 means none. ``weight`` is its share of a busy engine beside others'."""

    runs: int = 0
    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    input_tokens: int = 0
    checkpoint_bytes: int = 0
    sessions: int = 0
    samplers: int = 0
    weight: float = 1.0

    def with_(self, given: Mapping[str, float]) -> Quota:
        """The same with these limits, by name, in place of its own."""
        changed: dict[str, Any] = dict(given)
        return replace(self, **changed)


class Work(StrEnum):
    """What a request asks of a base model."""

    TRAINING = "training"
    SAMPLING = "sampling"


Engine = tuple[Work, str]
"""What is asked, of which base model."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What each tenant may ask of one engine, within its quota; 0 means no limit."""

    requests_per_second: float = 0.0
    tokens_per_second: float = 0.0
    input_tokens: int = 0


def check_input(tokens: int, allowed: int) -> None:
    """UserError if a request has more input tokens than its tenant may send at once; 0 allows any number."""
    if allowed and tokens > allowed:
        raise UserError(
            f"Input tokens ({tokens}) exceed maximum allowed ({allowed}): send fewer or shorter sequences at once"
        )


class Pace:
    """A rate with a burst of one second (GCRA, ITU-T I.371): what comes too soon is told how long to wait.

    A request larger than a second's worth passes once the debt of those before it is paid; nothing starves.
    """

    def __init__(self) -> None:
        self._paid_at = 0.0

    def wait(self, now: float, cost: float, rate: float) -> float:
        """Seconds until ``cost`` may pass."""
        burst = max(0.0, 1.0 - cost / rate)
        return max(0.0, self._paid_at - burst - now)

    def take(self, now: float, cost: float, rate: float) -> None:
        self._paid_at = max(self._paid_at, now) + cost / rate

    def idle(self, now: float) -> bool:
        return self._paid_at <= now


Payer = tuple[str, Engine | None]
"""A tenant, on the whole server or at one engine of it."""


def _lowest(limits: Iterable[float]) -> float:
    """0 is no limit."""
    return min((limit for limit in limits if limit), default=0.0)


class Quotas:
    """``tenants`` and ``groups`` change single limits for some; a tenant's own go before those of its groups.

    ``members`` says which groups a tenant is in. ``max_loras`` bounds the runs in use on one base model, whoever's
    they are. ``queues`` are limits of single engines: what a tenant trains does not slow what it samples.
    """

    def __init__(
        self,
        default: Quota | None = None,
        tenants: Mapping[str, Mapping[str, float]] | None = None,
        groups: Mapping[str, Mapping[str, float]] | None = None,
        max_loras: int = 0,
        members: Callable[[str], Collection[str]] = lambda tenant: (),
        queues: Mapping[Engine, Queue] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self.default = default or Quota()
        self.tenants = tenants or {}
        self.groups = groups or {}
        self.max_loras = max_loras
        self.members = members
        self.queues = queues or {}
        self._clock = clock
        self._requests: dict[Payer, Pace] = {}
        self._tokens: dict[Payer, Pace] = {}
        self._held: dict[str, int] = {}
        self._opening: dict[str, tuple[str, str]] = {}

    def of(self, tenant: str) -> Quota:
        quota = self.default
        for group in self.groups:  # in the order of the configuration: the last one a tenant is in decides
            if group in self.members(tenant):
                quota = quota.with_(self.groups[group])
        return quota.with_(self.tenants.get(tenant, {}))

    def weight(self, tenant: str) -> float:
        return self.of(tenant).weight

    # ---- rates ------------------------------------------------------------------------------------------------

    async def pace(
        self, tenant: str, requests: int = 0, tokens: int = 0, engine: Engine | None = None
    ) -> None:
        """Return when this much may pass, in the order of asking; Overloaded if that is too far off."""
        now = self._clock()
        due = [
            (self._pace(paces, payer, now), cost, rate)
            for payer, limits in self._limits(tenant, engine)
            for paces, cost, rate in (
                (self._requests, requests, limits.requests_per_second),
                (self._tokens, tokens, limits.tokens_per_second),
            )
            if cost and rate
        ]
        wait = max((pace.wait(now, cost, rate) for pace, cost, rate in due), default=0.0)
        if wait > HOLD:
            raise Overloaded(
                f"{tenant} sends more than {self.allowed(tenant, engine)} (paused_rate_limit): wait {wait:.0f} s",
                wait - HOLD / 2,
            )
        for pace, cost, rate in due:
            pace.take(now, cost, rate)
        if wait:
            self._held[tenant] = self._held.get(tenant, 0) + 1
            try:
                await self._sleep(wait)
            finally:
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]

    def paused(self, tenant: str) -> bool:
        """Whether requests of this tenant wait because of its rates right now."""
        return tenant in self._held

    def allowed(self, tenant: str, engine: Engine | None) -> str:
        """The rates that hold for a tenant's requests to an engine, in words: the lowest of each."""
        limits = [limits for _, limits in self._limits(tenant, engine)]
        rates = {
            "requests": _lowest(each.requests_per_second for each in limits),
            "tokens": _lowest(each.tokens_per_second for each in limits),
        }
        return " and ".join(f"{rate:g} {what} a second" for what, rate in rates.items() if rate)

    def _limits(self, tenant: str, engine: Engine | None) -> list[tuple[Payer, Quota | Queue]]:
        """What holds for a request, and whose account of it is kept."""
        found: list[tuple[Payer, Quota | Queue]] = [((tenant, None), self.of(tenant))]
        if engine is not None and engine in self.queues:
            found.append(((tenant, engine), self.queues[engine]))
        return found

    def _pace(self, paces: dict[Payer, Pace], payer: Payer, now: float) -> Pace:
        if len(paces) > REMEMBERED:
            for name in [name for name, pace in paces.items() if pace.idle(now)]:
                del paces[name]
        return paces.setdefault(payer, Pace())

    # ---- sizes ------------------------------------------------------------------------------------------------

    def input_tokens(self, tenant: str, engine: Engine | None = None) -> int:
        """How many a request may have; 0: any number."""
        return int(_lowest(limits.input_tokens for _, limits in self._limits(tenant, engine)))

    def check_input(self, tenant: str, tokens: int, engine: Engine | None = None) -> None:
        check_input(tokens, self.input_tokens(tenant, engine))

    def counts_tokens(self, tenant: str, engine: Engine) -> bool:
        """Whether any limit asks how many tokens a request has."""
        return any(each.tokens_per_second or each.input_tokens for _, each in self._limits(tenant, engine))

    def check_storage(self, tenant: str, used: int, more: int) -> None:
        """``used`` and ``more`` in bytes: of the tenant's checkpoints, and of the one it is about to add."""
        allowed = self.of(tenant).checkpoint_bytes
        if allowed and (used >= allowed or used + more > allowed):
            raise UserError(
                f"Checkpoint storage is full: {used} of {allowed} bytes are used: delete checkpoints, "
                "or let them expire (ttl_seconds); deleted ones count while a connected client samples from them"
            )

    def check_sessions(self, tenant: str, live: int) -> None:
        """UserError if a tenant with so many sessions may open no more."""
        allowed = self.of(tenant).sessions
        if allowed and live >= allowed:
            raise UserError(
                f"Session limit exceeded: {live}/{allowed}: finish one you no longer use (or restart its kernel); "
                "one that falls silent stops counting after adapter_timeout"
            )

    def check_samplers(self, tenant: str, kept: int) -> None:
        """UserError if a tenant with so many samplers may save weights for one more."""
        allowed = self.of(tenant).samplers
        if allowed and kept >= allowed:
            raise UserError(
                f"Sampler limit exceeded: {kept}/{allowed} samplers hold weights of your other sessions: finish a "
                "session you no longer use, or save the weights under a name (save_weights_for_sampler) and sample "
                "from that checkpoint"
            )

    # ---- runs -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opening(
        self, tenant: str, base_model: str, run: str, in_use: Iterable[tuple[str, str, str]]
    ) -> Iterator[None]:
        """Hold a place for ``run`` within the block, so that of many at once only as many pass as there are places.

        ``in_use`` are (run, tenant, base model) of the runs in use, whoever's; UserError when there is no place.
        """
        allowed = self.of(tenant).runs
        if run in self._opening or not (allowed or self.max_loras):
            yield
            return
        others = {name: (owner, model) for name, owner, model in in_use} | self._opening
        others.pop(run, None)
        mine = sum(1 for owner, _ in others.values() if owner == tenant)
        there = sum(1 for _, model in others.values() if model == base_model)
        if allowed and mine >= allowed:
            raise UserError(
                f"Model limit exceeded: {mine}/{allowed}: unload a model you no longer train "
                "(or end its session), then try again"
            )
        if self.max_loras and there >= self.max_loras:
            raise UserError(
                f"{base_model} has no free place (paused_capacity): {there} of {self.max_loras} adapters are in use "
                "(max_loras): try again when one is unloaded or idle"
            )
        self._opening[run] = (tenant, base_model)
        try:
            yield
        finally:
            del self._opening[run]
