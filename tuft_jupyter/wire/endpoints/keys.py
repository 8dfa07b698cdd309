"""Keys by their ids, for the owner of a server and its admins; other tenants see and revoke their own."""

from __future__ import annotations

from tuft_jupyter.core.keys import as_json
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, reply


class KeyEndpoints(Endpoints):
    async def list_keys(self, call: Call) -> Reply:
        return reply({"keys": [as_json(key) for key in self.host.keybook.listed(call.principal)]})

    async def create_key(self, call: Call) -> Reply:
        """The one answer that holds a key: it is not kept and cannot be asked for again."""
        asked = m.decode(m.CreateKey, call.body)
        key, kept = await self.host.keybook.create(
            call.principal, asked.tenant, asked.name, asked.ttl_seconds, admin=asked.admin
        )
        return reply({**as_json(kept), "key": key})

    async def expire_key(self, call: Call) -> Reply:
        seconds = m.decode(m.SetTtl, call.body).ttl_seconds
        return reply(as_json(await self.host.keybook.expire(call.principal, call.path["key"], seconds)))

    async def drop_key(self, call: Call) -> Reply:
        await self.host.keybook.revoke(call.principal, call.path["key"])
        return reply({})
