"""What a panel is told as it happens: records, and whatever changes beside them.

One generator for the two ways to listen, the panel's websocket and the API's ``/tuft/feed``. Messages are JSON objects
with a ``type``: ``records`` as they happen; ``status``, ``queue``, ``log`` as they change; ``gauges`` each second, with
``runs`` (what each takes in memory) where that changed; ``resync`` where the listener must fetch the state anew. A
listener that does not keep up is not waited for, and slows nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from tuft_jupyter.core.outlook import waiting
from tuft_jupyter.core.types import Principal
from tuft_jupyter.core.views import record_view
from tuft_jupyter_server.logtail import TAIL

if TYPE_CHECKING:
    from tuft_jupyter_server.host import Host

COALESCE = 0.1
"""Seconds between two messages with records: the first of a burst leaves at once, the others are gathered."""
LOOK_SECONDS = 1.0

Message = dict[str, Any]


async def messages(
    host: Host, principal: Principal, tenant: str | None, since: int | None
) -> AsyncGenerator[Message, None]:
    """For ``principal``, of one tenant or (None) of all; ``since`` is the number of the last record it knows."""
    loop = asyncio.get_running_loop()
    subscription = host.ledger.feed.subscribe(tenant)
    beside = Beside(host, principal, tenant)
    sent, look = -COALESCE, loop.time()
    try:
        with host.gauges.watched():
            if since is not None and since != host.ledger.state.n:
                yield {"type": "resync"}
            while True:
                if loop.time() >= look:
                    look = loop.time() + LOOK_SECONDS
                    for message in beside.changes():
                        yield message
                try:
                    async with asyncio.timeout_at(look):
                        records = await subscription.take()
                except TimeoutError:
                    continue
                await asyncio.sleep(max(0.0, sent + COALESCE - loop.time()))
                records += subscription.drain()
                sent = loop.time()
                if subscription.overflowed:
                    subscription.overflowed = False
                    yield {"type": "resync"}
                else:
                    yield {"type": "records", "records": [record_view(record) for record in records]}
    finally:
        host.ledger.feed.unsubscribe(subscription)


class Beside:
    """What a listener was last told of everything that is no record. The log is for those who may see everybody's."""

    def __init__(self, host: Host, principal: Principal, tenant: str | None) -> None:
        self._host = host
        self._principal = principal
        self._tenant = tenant
        self._status: Message = {}
        # None until it is told, empty or not: a panel that comes back still shows what waited when it left
        self._queue: list[Message] | None = None
        self._runs: Message = {}
        self._line = 0

    def changes(self) -> Iterator[Message]:
        """The messages that are due now."""
        status = self._host.status(self._principal)
        if status != self._status:
            self._status = status
            yield {"type": "status", "status": status}
        if self._host.gauges.latest:
            runs = {run: memory for run, memory in self._host.gauges.runs.items() if self._shown(run)}
            changed = {} if runs == self._runs else {"runs": runs}
            self._runs = runs
            # the panel reckons ages of runs by this: the clock of their records, at this moment
            yield {"type": "gauges", **self._host.gauges.latest, **changed, "time": self._host.ledger.clock()}
        queue = [each for each in waiting(self._host.service) if self._shown(each["run"])]
        if queue != self._queue:
            self._queue = queue
            yield {"type": "queue", "queue": queue}
        if self._tenant is None and (lines := TAIL.since(self._line)):
            self._line = lines[-1]["n"]
            yield {"type": "log", "lines": lines}

    def _shown(self, run: str) -> bool:
        if self._tenant is None:
            return True
        known = self._host.ledger.state.runs.get(run)
        return known is not None and known.tenant == self._tenant
