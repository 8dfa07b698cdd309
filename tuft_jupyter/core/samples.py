"""The newest sample requests of each training step with their answers, for the tenant that sent them.

Kept in memory only, as the bytes that came and went; nothing is looked into before somebody asks. Bounded: by requests
per step, by bytes per tenant and by bytes altogether; the oldest go first. Only the tenant that sent a request gets it
back: not the server's admin, and not the owner of the weights. It knows no HTTP and decodes nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from tuft_jupyter.core.objects import Sampler

PER_STEP = 8
"""Requests kept of each step of a run."""
LARGEST = 2**18
"""Bytes of a request and its answer; larger ones are not kept."""
PER_TENANT = 8 * 2**20
TOGETHER = 64 * 2**20
"""Bytes kept of one tenant, and of all."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A sample request: its body as it came, and the answer's. ``time`` in seconds since the epoch."""

    time: float
    body: bytes
    answer: bytes

    @property
    def size(self) -> int:
        return len(self.body) + len(self.answer)


_Key = tuple[str, str, int]
"""tenant, run, step"""


class Samples:
    """See the head of the file. ``keeping`` False: nothing is kept."""

    def __init__(self, keeping: bool = True) -> None:
        self.keeping = keeping
        self._kept: OrderedDict[_Key, list[Kept]] = OrderedDict()
        self._bytes: Counter[str] = Counter()  # by tenant

    def keep(self, sampler: Sampler, kept: Kept) -> None:
        """Remember a request that was answered, if a run's weights answered it."""
        if not self.keeping or sampler.run is None or sampler.step is None or kept.size > LARGEST:
            return
        key = (sampler.tenant, sampler.run, sampler.step)
        step = self._kept.setdefault(key, [])
        self._kept.move_to_end(key)
        step.append(kept)
        self._bytes[sampler.tenant] += kept.size
        if len(step) > PER_STEP:
            self._bytes[sampler.tenant] -= step.pop(0).size
        while self._bytes[sampler.tenant] > PER_TENANT:
            self._drop(next(key for key in self._kept if key[0] == sampler.tenant))
        while self._bytes.total() > TOGETHER:
            self._drop(next(iter(self._kept)))

    def steps(self, tenant: str, run: str) -> list[int]:
        """The steps of a run of whose weights the tenant has samples here, in order."""
        return sorted(step for owner, of, step in self._kept if (owner, of) == (tenant, run))

    def near(self, tenant: str, run: str, step: int) -> tuple[int, list[Kept]] | None:
        """(the step, its samples): the latest at or before ``step``, else the first after it, if there are any."""
        steps = self.steps(tenant, run)
        if not steps:
            return None
        found = max((each for each in steps if each <= step), default=steps[0])
        return found, list(self._kept[tenant, run, found])

    def _drop(self, key: _Key) -> None:
        self._bytes[key[0]] -= sum(kept.size for kept in self._kept.pop(key))
