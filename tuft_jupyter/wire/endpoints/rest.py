"""Looking around: runs and checkpoints (protocol section 2.13)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tuft_jupyter.core.state import Checkpoint, Run
from tuft_jupyter.core.types import CheckpointKind, Principal
from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire.endpoints.base import (
    Call,
    Endpoints,
    Reply,
    checked_ttl,
    cursor_of,
    iso_time,
    page_of,
    path_of,
    reply,
)
from tuft_jupyter.wire.endpoints.search import NO_PROJECT

TYPES = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}


class RestEndpoints(Endpoints):
    async def list_runs(self, call: Call) -> Reply:
        mine = [r for r in self.service.state.runs.values() if r.tenant == call.principal.tenant]
        project = call.query.get("project_id")
        if project is not None:
            mine = [run for run in mine if self._project(run) == project]
        page = page_of(sorted(mine, key=lambda r: -r.created), call.query, 20)
        cursor = cursor_of(call.query, 20, len(mine))
        saved: defaultdict[str, list[Checkpoint]] = defaultdict(list)
        for checkpoint in self.service.checkpoints.mine(call.principal):  # once: both may be thousands
            saved[checkpoint.run].append(checkpoint)
        return reply({"training_runs": [self._run(run, saved[run.id]) for run in page], "cursor": cursor})

    async def get_run(self, call: Call) -> Reply:
        run = self.service.runs.get(call.principal, call.path["run"])
        return reply(self._run(run, self.service.checkpoints.mine(Principal(run.tenant), run.id)))

    async def list_run_checkpoints(self, call: Call) -> Reply:
        run = self.service.runs.get(call.principal, call.path["run"])
        found = self.service.checkpoints.mine(Principal(run.tenant), run.id)
        return reply({"checkpoints": [_checkpoint(c) for c in found]})

    async def list_checkpoints(self, call: Call) -> Reply:
        mine = self.service.checkpoints.mine(call.principal)
        page = page_of(mine, call.query, 100)
        cursor = cursor_of(call.query, 100, len(mine))
        return reply({"checkpoints": [_checkpoint(c) for c in page], "cursor": cursor})

    async def set_ttl(self, call: Call) -> Reply:
        ttl = checked_ttl(m.decode(m.SetTtl, call.body).ttl_seconds)
        expires = None if ttl is None else self.service.ledger.clock() + ttl
        await self.service.checkpoints.change(call.principal, path_of(call), {"expires": expires})
        return reply({})

    async def publish(self, call: Call) -> Reply:
        await self.service.checkpoints.change(call.principal, path_of(call), {"public": True})
        return reply({})

    async def unpublish(self, call: Call) -> Reply:
        await self.service.checkpoints.change(call.principal, path_of(call), {"public": False})
        return reply({})

    async def delete_checkpoint(self, call: Call) -> Reply:
        await self.service.checkpoints.delete(call.principal, path_of(call))
        return reply({})

    async def weights_info(self, call: Call) -> Reply:
        asked = m.decode(m.TinkerPath, call.body)
        found = self.service.checkpoints.readable(call.principal, asked.tinker_path)
        flags = {name: found.lora.get(name) for name in ("train_unembed", "train_mlp", "train_attn")}
        return reply(
            {
                "base_model": found.base_model,
                "is_lora": True,
                "lora_rank": found.lora.get("rank"),
                "optimizer_config": {"type": "adamw"},
                **flags,
            }
        )

    def _project(self, run: Run) -> str:
        session = self.service.state.sessions.get(run.session)
        return (session.project_id if session else None) or NO_PROJECT

    def _run(self, run: Run, saved: Sequence[Checkpoint]) -> dict[str, Any]:
        """``saved``: its checkpoints, newest first."""
        last = {kind: next((c for c in saved if c.kind == kind), None) for kind in CheckpointKind}
        training, sampler = last[CheckpointKind.TRAINING], last[CheckpointKind.SAMPLER]
        return {
            "training_run_id": run.id,
            "base_model": run.base_model,
            "model_owner": run.tenant,
            "is_lora": True,
            "lora_rank": run.lora.get("rank"),
            "corrupted": run.status == "failed",
            "last_request_time": iso_time(run.last_request),
            "last_checkpoint": _checkpoint(training) if training else None,
            "last_sampler_checkpoint": _checkpoint(sampler) if sampler else None,
            "user_metadata": run.user_metadata,
        }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": TYPES[CheckpointKind(checkpoint.kind)],
        "time": iso_time(checkpoint.created),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": None if checkpoint.expires is None else iso_time(checkpoint.expires),
    }
