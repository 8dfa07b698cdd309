"""Weights that leave: archives and the files of exports, behind addresses that carry their own permission (2.13).

An address names one saved checkpoint and expires. It holds for the weights as they were when it was made: if the
checkpoint is saved again or deleted, the address leads nowhere.
"""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from pathlib import Path

from tuft_jupyter.core.errors import NotFound, UserError
from tuft_jupyter.core.state import Checkpoint
from tuft_jupyter.core.types import CheckpointKind, run_id
from tuft_jupyter.wire import archive, sealing
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, checked_ttl, iso_time, path_of, reply
from tuft_jupyter.wire.tickets import Ticket


class TransferEndpoints(Endpoints):
    async def save_weights_external(self, call: Call) -> Reply:
        asked = m.decode(m.SaveWeightsExternal, call.body)
        recipients = asked.age_encryption_recipients or []
        sealing.check(recipients)
        request_id = await self.service.runs.save_weights(
            call.principal,
            asked.model_id,
            asked.seq_id,
            asked.path,
            CheckpointKind.EXTERNAL,
            call.body,
            ttl=checked_ttl(asked.ttl_seconds),
            recipients=recipients,
        )
        return reply({"request_id": request_id, "model_id": asked.model_id})

    async def external_weights_urls(self, call: Call) -> Reply:
        """Encrypts at the first call, file by file; the plain files go with it."""
        found = self.service.checkpoints.find(call.principal, path_of(call))
        if found.kind != CheckpointKind.EXTERNAL:
            raise UserError(
                f"{found.path} is no export: call save_weights_external, or ask for the archive of a checkpoint"
            )
        names = [*archive.ADAPTER]
        if found.recipients:
            names = await asyncio.to_thread(sealing.seal, Path(found.directory), names, found.recipients)
        addresses = {name: self._address(call, found, name) for name in names}
        return reply(
            {
                "urls": {name: url for name, (url, _) in addresses.items()},
                "expires": iso_time(min(expires for _, expires in addresses.values())),
            }
        )

    async def archive(self, call: Call) -> Reply:
        """As JSON, or as a redirect for the early SDKs: they ask for gzip beside JSON, and read a redirect only."""
        found = self.service.checkpoints.find(call.principal, path_of(call))
        if found.recipients:
            raise UserError(f"{found.path} is an encrypted export: ask for its external_weights_urls")
        url, expires = self._address(call, found, "")
        if "application/gzip" in call.accept:
            return Reply(b"", 302, headers={"Location": url, "Expires": formatdate(expires, usegmt=True)})
        return reply({"url": url, "expires": iso_time(expires)})

    async def copy_weights(self, call: Call) -> Reply:
        asked = m.decode(m.CopyWeights, call.body)
        ttl = checked_ttl(asked.ttl_seconds)
        source = self.service.checkpoints.readable(call.principal, asked.source_path)
        if asked.session_id is not None and asked.model_seq_id is not None:
            session, number = asked.session_id, asked.model_seq_id
        elif asked.destination_project_id is not None:
            details = {"tags": ["copy_weights"], "project_id": asked.destination_project_id}
            session, number = await self.service.sessions.open(call.principal, details), 0
        else:
            raise UserError(
                "copy_weights: give destination_project_id, or session_id together with model_seq_id"
            )
        path = await self.service.checkpoints.copy(
            source, self.service.sessions.get(call.principal, session), run_id(session, number), ttl
        )
        return reply({"tinker_path": path})

    async def download(self, call: Call) -> Reply:
        ticket = self.host.tickets.read(call.path["ticket"])
        found = self.service.state.checkpoints.get(ticket.path)
        if found is None or _version(found) != ticket.version:
            raise NotFound(f"{ticket.path} was deleted, or saved again: ask for a new address")
        directory = Path(found.directory)
        if ticket.file:
            stream, name = await archive.one_file(directory / ticket.file), ticket.file
        else:
            stream, name = await archive.tar(directory, archive.ADAPTER, found.created), f"{found.name}.tar"
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return Reply(b"", content_type="application/octet-stream", headers=headers, stream=stream)

    def _address(self, call: Call, checkpoint: Checkpoint, file: str) -> tuple[str, float]:
        signed, expires = self.host.tickets.issue(Ticket(checkpoint.path, _version(checkpoint), file))
        return f"{self.host.public_root or call.root}/tuft/files/{signed}", expires


def _version(checkpoint: Checkpoint) -> str:
    """The random name of its directory: another one each time that a name is saved."""
    return Path(checkpoint.directory).name
