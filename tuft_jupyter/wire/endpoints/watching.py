"""Watching one's own work from a kernel or a terminal, and taking a run over (not part of the Tinker protocol).

What may change is asked for with the version last seen, and the answer is held until there is another: no polling, and
nothing to keep on either side.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from tuft_jupyter.core.errors import Forbidden
from tuft_jupyter.core.outlook import next_seq, outlook, points
from tuft_jupyter.core.views import state_view
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, event, event_stream, number, reply
from tuft_jupyter.wire.sample_view import sample_views


class WatchingEndpoints(Endpoints):
    async def outlook(self, call: Call) -> Reply:
        """``version`` names the content; a caller that sends it as ``seen`` waits for another, ``wait`` seconds."""
        tenant = _asked(call)
        subscription = self.service.ledger.feed.subscribe(tenant)
        try:
            async with asyncio.timeout(min(number(call.query, "wait", 20), self.hold_seconds)):
                while True:
                    body, version = self._outlook(tenant)
                    if version != call.query.get("seen"):
                        return Reply(body)
                    await subscription.take()
        except TimeoutError:
            return Reply(self._outlook(tenant)[0])
        finally:
            self.service.ledger.feed.unsubscribe(subscription)

    def _outlook(self, tenant: str | None) -> tuple[bytes, str]:
        shown = {"tenant": tenant or "*", **outlook(self.service, tenant)}
        version = hashlib.blake2b(msgspec.json.encode(shown), digest_size=12).hexdigest()
        return msgspec.json.encode({"version": version, **shown}), version

    async def show_state(self, call: Call) -> Reply:
        """The caller's own; an admin may ask for another tenant's or for everybody's, and others get theirs."""
        tenant = _asked(call)
        return reply(
            {"state": state_view(self.service.state, tenant), "status": self.host.status(call.principal)}
        )

    async def feed(self, call: Call) -> Reply:
        """Server-sent events, until the caller leaves or for ``wait`` seconds."""
        since, seconds = (
            number(call.query, name, 0) if name in call.query else None for name in ("since", "wait")
        )
        messages = self.host.live(call.principal, _asked(call), since)
        return event_stream(_events(messages, seconds))

    async def curve(self, call: Call) -> Reply:
        run = self.service.runs.get(call.principal, call.path["run"])
        start = number(call.query, "start", 0)
        return reply({"run": run.id, "start": start, "columns": points(run, start)})

    async def samples(self, call: Call) -> Reply:
        """``step``: whose weights these samples are of, null if none are kept near the one asked for."""
        run = self.service.runs.get(call.principal, call.path["run"])
        samples, tenant = self.service.sampling.samples, call.principal.tenant
        near = samples.near(tenant, run.id, number(call.query, "step", run.step))
        step, shown = None, []
        if near is not None:
            step, kept = near
            card = self.service.catalog.resolve(run.base_model)
            shown = await asyncio.to_thread(lambda: sample_views(kept, self.host.words(card)))
        return reply(
            {"run": run.id, "step": step, "steps": samples.steps(tenant, run.id), "samples": shown}
            | {"keeping": samples.keeping}
        )

    async def resume(self, call: Call) -> Reply:
        """What a client needs that goes on with a run: its step, and the number of the next request."""
        asked = m.decode(m.SessionOnly, call.body)
        run = await self.service.runs.resume(call.principal, call.path["run"], asked.session_id)
        return reply(
            {"model_id": run.id, "base_model": run.base_model, "step": run.step, "pending": run.pending}
            | {"next_seq": next_seq(self.service, run)}
        )

    async def ray(self, call: Call) -> Reply:
        if not call.principal.admin:
            raise Forbidden(
                "only the owner of this server and its admins may look at its cluster: ask one of them"
            )
        return reply(await self.host.ray())

    async def gauges(self, call: Call) -> Reply:
        return reply(await self.host.measured())


async def _events(
    messages: AsyncGenerator[dict[str, Any], None], seconds: float | None
) -> AsyncGenerator[bytes, None]:
    end = None if seconds is None else asyncio.get_running_loop().time() + seconds
    async with aclosing(messages):
        while True:
            try:
                async with asyncio.timeout_at(end):
                    message = await anext(messages)
            except TimeoutError:
                return
            yield event(msgspec.json.encode(message))


def _asked(call: Call) -> str | None:
    """Whose things a caller is shown: their own; an admin's choice, None for everybody's."""
    asked = call.query.get("tenant", "") if call.principal.admin else ""
    return None if asked == "*" else asked or call.principal.tenant
