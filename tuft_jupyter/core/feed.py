"""The live feed: every record, as it happens, to every subscriber that may see it.

A subscriber that does not keep up is not waited for: its queue is dropped and it is told to fetch the state again
(``resync``). The feed knows neither websockets nor what the records mean.
"""

from __future__ import annotations

import asyncio
from collections import deque

from tuft_jupyter.core.types import Record

CAPACITY = 1024
"""Records a slow subscriber may lag behind before it must fetch the state anew."""


class Subscription:
    """One listener's queue of at most ``CAPACITY`` records."""

    def __init__(self, tenant: str | None) -> None:
        self.tenant = tenant
        self.overflowed = False
        self._records: deque[Record] = deque()
        self._arrived = asyncio.Event()

    def offer(self, record: Record) -> None:
        if self.tenant is not None and record.tenant != self.tenant:
            return
        if len(self._records) >= CAPACITY:
            self.lose()
        self._records.append(record)
        self._arrived.set()

    def lose(self) -> None:
        """Drop what is queued: the listener must fetch the state anew."""
        self._records.clear()
        self.overflowed = True
        self._arrived.set()

    async def take(self) -> list[Record]:
        """Wait for at least one record, then take all that are there."""
        await self._arrived.wait()
        return self.drain()

    def drain(self) -> list[Record]:
        """Take what is there, without waiting."""
        self._arrived.clear()
        taken = list(self._records)
        self._records.clear()
        return taken


class Feed:
    """Fans records out to subscriptions; ``tenant=None`` gets every tenant's."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    def publish(self, record: Record) -> None:
        for subscription in self._subscriptions:
            subscription.offer(record)

    def anew(self) -> None:
        """The state was replaced by another one, which no record tells of."""
        for subscription in self._subscriptions:
            subscription.lose()

    def subscribe(self, tenant: str | None) -> Subscription:
        subscription = Subscription(tenant)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def __len__(self) -> int:
        return len(self._subscriptions)
