"""What the lab may see of state and records: plain JSON, without bodies, directories and digests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tuft_jupyter.core.state import Run, State
from tuft_jupyter.core.types import Record


def state_view(state: State, tenant: str | None = None, *, curves: bool = True) -> dict[str, Any]:
    """What the lab may show: plain JSON, of one tenant or (None) of everybody, without directories."""

    def mine(items: Iterable[Any]) -> list[Any]:
        return [item for item in items if tenant is None or item.tenant == tenant]

    return {
        "n": state.n,
        "sessions": [
            {
                "id": s.id,
                "tenant": s.tenant,
                "created": s.created,
                "display_name": s.display_name,
                "sdk_version": s.sdk_version,
                "finished": s.finished,
            }
            for s in mine(state.sessions.values())
        ],
        "runs": [_run_view(r) | (_curve_view(r) if curves else {}) for r in mine(state.runs.values())],
        "samplers": [
            {
                "id": s.id,
                "session": s.session,
                "tenant": s.tenant,
                "base_model": s.base_model,
                "created": s.created,
                "model_path": s.model_path,
                "run": s.run,
                "step": s.step,
            }
            for s in mine(state.samplers.values())
        ],
        "checkpoints": [
            {
                "path": c.path,
                "run": c.run,
                "tenant": c.tenant,
                "kind": c.kind,
                "name": c.name,
                "created": c.created,
                "size_bytes": c.size_bytes,
                "expires": c.expires,
                "public": c.public,
                "step": c.step,
            }
            for c in mine(state.checkpoints.values())
        ],
    }


def _run_view(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "session": run.session,
        "tenant": run.tenant,
        "base_model": run.base_model,
        "rank": run.lora.get("rank"),
        "created": run.created,
        "status": run.status,
        "error": run.error,
        "last_error": run.last_error,
        "step": run.step,
        "tokens": run.tokens,
        "engine_ms": run.engine_ms,
        "pending": run.pending,
        "last_request": run.last_request,
        "loss_sum": run.loss_sum,
        "weight_sum": run.weight_sum,
        "kl_sum": run.kl_sum,
        "kl_tokens": run.kl_tokens,
        "step_tokens": run.step_tokens,
        "passes": run.passes,
    }


def _curve_view(run: Run) -> dict[str, Any]:
    return {"curve": {name: list(values) for name, values in run.curve.items()}}


def record_view(record: Record) -> dict[str, Any]:
    """A record as a live event: what the browser needs to fold it, without bodies and directories."""
    data = {
        k: v
        for k, v in record.data.items()
        if k not in ("directory", "directories", "digest", "content_type")
    }
    if "args" in data:
        shown = ("session", "base_model", "lora")
        data["args"] = {k: v for k, v in data["args"].items() if k in shown}
    facts = data.get("facts") or {}
    for part in ("checkpoint", "sampler"):
        if part in facts:
            part_shown = {k: v for k, v in facts[part].items() if k != "directory"}
            facts = data["facts"] = {**facts, part: part_shown}
    return {"n": record.n, "kind": record.kind, "tenant": record.tenant, "time": record.time, "data": data}
