"""Weights that arrive: an adapter made elsewhere becomes a checkpoint to train on and sample from.

The same code serves programs with a key and the lab's panel. Nothing is kept of an archive that is refused.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from tuft_jupyter.core import adapters
from tuft_jupyter.core.adapters import CONFIG, CONFIG_BYTES, WEIGHTS, Foreign
from tuft_jupyter.core.checkpoints import check_name
from tuft_jupyter.core.durable import sync, sync_all
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import ModelCard, Principal, run_id
from tuft_jupyter.wire import unpack
from tuft_jupyter.wire.endpoints.base import Call, Endpoints, Reply, checked_ttl, reply

HOW = f"send a tar archive of {CONFIG} and {WEIGHTS} (tar cf - -C DIRECTORY .)"


class UploadEndpoints(Endpoints):
    async def upload_adapter(self, call: Call) -> Reply:
        """Answers with the checkpoint's path, which :meth:`load_weights` and samplers take."""
        service = self.service
        base, name = call.query.get("base_model", ""), call.query.get("name", "uploaded")
        if not base:
            raise UserError("base_model: name the base model it was trained on in the query (?base_model=)")
        check_name(name)
        ttl = checked_ttl(_seconds(call.query.get("ttl_seconds")))
        card = await service.card(call.principal, base)
        if call.upload is None:
            raise UserError(f"the body is empty: {HOW}")
        # Whoever sent it may hang up meanwhile: what is on record by then keeps its files.
        return reply(await asyncio.shield(self._keep(call.principal, call.upload, card, name, ttl)))

    async def _keep(
        self, principal: Principal, archive: BinaryIO, card: ModelCard, name: str, ttl: float | None
    ) -> dict[str, Any]:
        service = self.service
        directory = service.checkpoints.root / uuid.uuid4().hex
        limit = card.max_rank or service.limits.max_rank
        try:
            foreign, size = await asyncio.to_thread(receive, archive, directory, card, limit)
            with service.checkpoints.room(principal.tenant, str(directory), size):
                details = {"tags": ["upload"], "display_name": f"upload of {name}"}
                session = await service.sessions.open(principal, details)
                run = run_id(session, 0)
                path = await service.checkpoints.adopt(
                    service.sessions.get(principal, session),
                    run,
                    name,
                    card.name,
                    foreign.lora,
                    directory,
                    size,
                    ttl,
                )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        told = {"tinker_path": path, "training_run_id": run, "base_model": card.name}
        return {**told, "lora_rank": foreign.lora["rank"]}


def receive(archive: BinaryIO, directory: Path, base: ModelCard, max_rank: int) -> tuple[Foreign, int]:
    """Unpack the two files into ``directory``; what they are, and their bytes. The configuration is written anew."""
    directory.mkdir(parents=True)
    config, found = b"", set()
    for name, chunks in unpack.files(archive, {CONFIG: CONFIG_BYTES, WEIGHTS: archive.seek(0, os.SEEK_END)}):
        found.add(name)
        if name == CONFIG:
            config = b"".join(chunks)
            continue
        with (directory / WEIGHTS).open("xb") as file:
            file.writelines(chunks)
    if missing := sorted({CONFIG, WEIGHTS} - found):
        raise UserError(f"archive: {' and '.join(missing)} missing; {HOW}, saved by PEFT as safetensors")
    foreign = adapters.examine(config, directory / WEIGHTS, base, max_rank)
    (directory / CONFIG).write_text(foreign.config, encoding="utf-8")
    sync_all(directory)
    sync(directory.parent)
    return foreign, sum(file.stat().st_size for file in directory.iterdir())


def _seconds(text: str | None) -> float | None:
    try:
        seconds = None if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if seconds is not None and not math.isfinite(seconds):
        raise UserError(f"ttl_seconds: {text!r} is no number of seconds")
    return seconds
