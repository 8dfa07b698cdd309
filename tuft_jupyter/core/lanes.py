"""Lanes: the ordered ops of each run, and the one place that decides what runs next.

A lane is first in, first out, in order of arrival. :meth:`Lanes.next_batch` shares the engine by deficit round robin
over tenants (Shreedhar & Varghese 1995), counted in tokens: a large op is granted in parts, so a small op of another
tenant waits for at most one batch, and is not packed together with a part that would take much longer than itself.
Before a heavy part is begun, a light tenant that just got an answer and is known to ask again at once is waited for,
for a moment (anticipatory scheduling, Iyer & Druschel 2001); :data:`MAX_YIELDS` bounds how often a heavy tenant yields.

The module knows neither the journal nor the engine: it is a plain data structure for the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tuft_jupyter.core.types import Op, OpKind

FLAT_COST = 16
"""Tokens that an op without tokens (optim_step, save ...) counts for."""

MAX_RATIO = 4
"""A tenant's part of a batch may be at most this many times the parts of all lighter tenants together."""

MAX_YIELDS = 8
"""How often in a row a heavy tenant yields to lighter ones before it is served."""

MAX_WAIT = 0.1
"""Seconds that a light tenant is waited for at most: about what a heavy part would make it wait instead."""

WAIT_SLACK = 0.005
"""Seconds by which a request may come later than expected, whatever the think times before it were."""

ADDITIVE = {OpKind.FORWARD, OpKind.FORWARD_BACKWARD}


@dataclass(slots=True, eq=False)
class Entry:
    """An op in its lane. ``record`` is the journal record that accepted it; ``done`` counts tokens worked off.

    ``attempts`` counts the workers that died while they had it in hand, ``servers`` those that ended after they had
    begun it again; ``left_over`` says that an earlier server accepted it, and this one has not begun it yet.
    """

    op: Op
    record: int
    done: int = 0
    sent: bool = False
    attempts: int = 0
    servers: int = 0
    left_over: bool = False

    @property
    def suspect(self) -> bool:
        return self.attempts > 0 or self.servers > 0

    @property
    def cost(self) -> int:
        return max(self.op.tokens - self.done, 1) if self.op.kind in ADDITIVE else FLAT_COST


@dataclass(slots=True, eq=False)
class Lane:
    """One run's queue. ``resident`` is True while the engine holds the adapter as the journal tells it; ``deaths``
    counts the workers in a row that died while they brought it back."""

    run: str
    tenant: str
    queue: deque[Entry] = field(default_factory=deque)
    resident: bool = False
    deaths: int = 0

    def send_anew(self) -> None:
        """The worker holds nothing of what waits: it gets each op from its beginning."""
        for entry in self.queue:
            entry.sent, entry.done = False, 0


@dataclass(slots=True)
class Activity:
    """When a tenant last asked and was last answered, the tokens of its last pass, and its last two think times: the
    seconds from an answer to its next request."""

    asked: float = -1e9
    answered: float = -1e9
    tokens: int = 0
    think_times: tuple[float, float] = (1e9, 1e9)

    @property
    def expected(self) -> float:
        """When it will have asked again, by its shorter think time: the longer one may be an outlier."""
        return self.answered + min(WAIT_SLACK + 2 * min(self.think_times), MAX_WAIT)


@dataclass(slots=True, eq=False)
class Grant:
    """Permission to work on up to ``tokens`` tokens of an entry in the coming step."""

    lane: Lane
    entry: Entry
    tokens: int


class Lanes:
    """All lanes of one base model. ``weight`` says how large a share of a busy engine a tenant has beside others."""

    def __init__(
        self,
        budget: int,
        shared_budget: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        weight: Callable[[str], float] = lambda tenant: 1.0,
    ) -> None:
        self.budget = budget
        self._weight = weight
        self.shared_budget = shared_budget or budget
        self.by_run: dict[str, Lane] = {}
        self._deficit: OrderedDict[str, float] = OrderedDict()
        self._next_lane: dict[str, str] = {}
        self._clock = clock
        self._yielded: dict[str, int] = {}
        self._activity: dict[str, Activity] = {}
        self._work = asyncio.Event()
        self._pushed = asyncio.Event()

    def set_budget(self, tokens: int) -> None:
        """Grant parts of this many tokens, and half as many where several tenants wait."""
        self.budget, self.shared_budget = tokens, max(1, tokens // 2)

    def lane(self, run: str, tenant: str) -> Lane:
        """The lane of a run, made when first asked for."""
        return self.by_run.setdefault(run, Lane(run, tenant))

    def push(self, op: Op, record: int) -> Entry:
        entry = Entry(op, record)
        activity = self._activity.setdefault(op.tenant, Activity())
        if (
            activity.asked <= activity.answered
        ):  # the first after an answer, not the second of a pipelined pair
            activity.asked = self._clock()
            activity.think_times = (activity.think_times[1], activity.asked - activity.answered)
        self.lane(op.run, op.tenant).queue.append(entry)
        self._deficit.setdefault(op.tenant, 0.0)
        self._work.set()
        self._pushed.set()
        return entry

    def finish(self, grant: Grant) -> None:
        """The entry at the head of its lane is over."""
        grant.lane.queue.remove(grant.entry)
        activity = self._activity.setdefault(grant.lane.tenant, Activity())
        activity.answered = self._clock()
        if grant.entry.op.kind in ADDITIVE:
            activity.tokens = grant.entry.op.tokens

    def drop(self, run: str) -> None:
        self.by_run.pop(run, None)

    async def work(self) -> None:
        """Wait until there is something to run."""
        while not any(lane.queue for lane in self.by_run.values()):
            self._work.clear()
            await self._work.wait()

    async def arrival(self) -> None:
        """Wait for the next push."""
        self._pushed.clear()
        await self._pushed.wait()

    def trailing_steps(self, batch: list[Grant]) -> list[Grant]:
        """Optimizer steps that come right behind passes which this batch finishes: they may follow it at once."""
        granted = {id(grant.entry): grant for grant in batch}
        trailing = []
        for lane in {id(grant.lane): grant.lane for grant in batch}.values():
            for entry in lane.queue:
                grant = granted.get(id(entry))
                if grant is None:
                    if entry.op.kind is OpKind.OPTIM_STEP and not (entry.suspect or entry.left_over):
                        trailing.append(Grant(lane, entry, FLAT_COST))
                    break
                if entry.op.kind not in ADDITIVE or grant.tokens < entry.cost:
                    break
        return trailing

    def position(self, run: str, request_id: str) -> tuple[int, int]:
        """(ops of all tenants queued before this one in its own lane, lanes with work)."""
        lane = self.by_run.get(run)
        ahead = 0
        for entry in lane.queue if lane else ():
            if entry.op.request_id == request_id:
                break
            ahead += 1
        return ahead, sum(1 for lane in self.by_run.values() if lane.queue)

    def next_batch(self) -> list[Grant]:
        """What to run next.

        An op that was in a batch when the engine or the server died runs alone, so that a poisonous one is told from
        its neighbours. Optimizer steps that are due run before any pass: they cost next to nothing, and somebody waits
        for each. Otherwise the tenants with work share a batch of at most one budget of tokens.
        """
        suspect = self._suspect()
        if suspect is not None:
            return [suspect]
        heads = [(lane, lane.queue[0]) for lane in self.by_run.values() if lane.queue]
        steps = [Grant(lane, head, FLAT_COST) for lane, head in heads if head.op.kind is OpKind.OPTIM_STEP]
        return steps or self._without_oversized(self._shared([lane for lane, _ in heads]))

    def _shared(self, lanes: list[Lane]) -> list[Grant]:
        """One budget of tokens, by deficit round robin over the tenants of these lanes."""
        waiting: dict[str, list[Lane]] = {}
        for lane in lanes:
            waiting.setdefault(lane.tenant, []).append(lane)
        for tenant in list(self._deficit):
            if tenant not in waiting:
                del self._deficit[tenant]  # an idle tenant saves nothing up
        due = {tenant for tenant in waiting if self._yielded.get(tenant, 0) >= MAX_YIELDS}
        if due:
            waiting = {tenant: waiting[tenant] for tenant in due}
        budget = self.budget if len(self._deficit) <= 1 else self.shared_budget
        weights = {tenant: self._weight(tenant) for tenant in waiting}
        shares = sum(weights.values())
        quanta = {tenant: max(1, int(budget * weights[tenant] / shares)) for tenant in waiting}
        batch: list[Grant] = []
        left = budget
        for tenant in self._small_demands_first(waiting, quanta):
            self._deficit[tenant] = min(self._deficit[tenant] + quanta[tenant], 2.0 * budget)
            left = self._serve(tenant, waiting[tenant], left, batch, int(self._deficit[tenant]))
        for tenant in waiting:  # what nobody claimed goes to whoever still has work
            left = self._serve(tenant, waiting[tenant], left, batch, left)
        if self._deficit:
            self._deficit.move_to_end(next(iter(self._deficit)))
        return batch

    def _small_demands_first(self, waiting: dict[str, list[Lane]], quanta: dict[str, int]) -> list[str]:
        """The tenants in turn, but first who wants no more than its share: savings of others must not crowd it out."""
        turn = [tenant for tenant in self._deficit if tenant in waiting]
        return sorted(turn, key=lambda tenant: _demand(waiting[tenant], quanta[tenant]) > quanta[tenant])

    def _without_oversized(self, batch: list[Grant]) -> list[Grant]:
        """Leave out whose work is so much larger that the others would mostly wait for it; they come next."""
        tokens: dict[str, int] = {}
        for grant in batch:
            tokens[grant.lane.tenant] = tokens.get(grant.lane.tenant, 0) + grant.tokens
        kept = 0
        out: set[str] = set()
        for tenant in sorted(tokens, key=lambda name: tokens[name]):
            if kept and tokens[tenant] > MAX_RATIO * kept:
                out.add(tenant)
                self._yielded[tenant] = self._yielded.get(tenant, 0) + 1
                self._deficit[tenant] += tokens[tenant]
            else:
                self._yielded.pop(tenant, None)
                kept += tokens[tenant]
        return [grant for grant in batch if grant.lane.tenant not in out]

    def anticipation(self) -> float:
        """Seconds to wait for an :meth:`arrival` before the next batch, because a light tenant is about to ask."""
        heads: dict[str, int] = {}
        for lane in self.by_run.values():
            if lane.queue:
                if lane.queue[0].op.kind not in ADDITIVE or lane.queue[0].suspect:
                    return 0.0
                cost = min(lane.queue[0].cost, self.shared_budget)
                heads[lane.tenant] = min(cost, heads.get(lane.tenant, cost))
        if not heads or any(self._yielded.get(tenant, 0) >= MAX_YIELDS for tenant in heads):
            return 0.0
        now, lightest = self._clock(), min(heads.values())
        for tenant, activity in self._activity.items():
            left = activity.expected - now
            prompt = min(activity.think_times) < MAX_WAIT
            if tenant not in heads and prompt and left > 0 and lightest > MAX_RATIO * activity.tokens:
                for heavy in heads:
                    self._yielded[heavy] = self._yielded.get(heavy, 0) + 1
                return left
        return 0.0

    def _suspect(self) -> Grant | None:
        for lane in self.by_run.values():
            if lane.queue and lane.queue[0].suspect:
                return Grant(lane, lane.queue[0], lane.queue[0].cost)
        return None

    def _serve(self, tenant: str, lanes: list[Lane], left: int, batch: list[Grant], allowance: int) -> int:
        """Take ops of one tenant, one lane after the other, while budget and allowance last."""
        granted = {id(grant.entry): grant for grant in batch}
        start = self._next_lane.get(tenant)
        order = sorted(lanes, key=lambda lane: lane.run)
        order = [lane for lane in order if not start or lane.run > start] + [
            lane for lane in order if start and lane.run <= start
        ]
        for lane in order:
            for entry in _runnable(lane):
                if left <= 0 or allowance <= 0:
                    return left
                grant = granted.get(id(entry))
                taken = grant.tokens if grant else 0
                share = min(entry.cost - taken, left, allowance)
                if share <= 0:
                    continue
                if grant:
                    grant.tokens += share
                else:
                    batch.append(Grant(lane, entry, share))
                left -= share
                allowance -= share
                self._deficit[tenant] -= share
                self._next_lane[tenant] = lane.run
                if taken + share < entry.cost:
                    break  # the rest of this op comes first in its lane
        return left


def _demand(lanes: list[Lane], enough: int) -> int:
    """Tokens that these lanes could use in one step, counted until they are more than ``enough``."""
    tokens = 0
    for lane in lanes:
        for entry in _runnable(lane):
            tokens += entry.cost
            if tokens > enough:
                return tokens
    return tokens


def _runnable(lane: Lane) -> list[Entry]:
    """The entries at the head of a lane that one step may hold: passes add up, anything else runs by itself."""
    head = lane.queue[0]
    if head.op.kind not in ADDITIVE:
        return [head]
    entries = []
    for entry in lane.queue:
        if entry.op.kind not in ADDITIVE:
            break
        entries.append(entry)
    return entries
