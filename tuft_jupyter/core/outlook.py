"""The state of a tenant's own work, in one small answer that kernels and terminals ask for often.

Curves are left out (they are fetched by points, see :func:`points`), so the answer stays small however long a run is.
Each run says in one sentence why nothing moves, or why its last request failed. It reads state and lanes and changes
nothing.
"""

from __future__ import annotations

from typing import Any

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.quotas import Work
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.state import CURVE_COLUMNS, Run
from tuft_jupyter.core.views import state_view

RATE_STEPS = 20
"""Tokens per second are counted over this many steps."""


def outlook(service: Service, tenant: str | None) -> dict[str, Any]:
    """Sessions, runs, samplers and checkpoints of one tenant (None: of all).

    Runs come without their curves, with their present numbers.
    """
    shown = state_view(service.state, tenant, curves=False)
    shown.pop("n")  # it moves with other tenants' work
    for run in shown["runs"]:
        run |= now(service, service.state.runs[run["id"]])
    return shown


def now(service: Service, run: Run) -> dict[str, Any]:
    """``loss`` (nats per weighted token), ``tokens_per_second``, ``next_seq`` and ``why``, of one run."""
    return {
        "loss": next((loss for loss in reversed(run.curve["loss"]) if loss is not None), None),
        "tokens_per_second": _rate(run),
        "next_seq": next_seq(service, run),
        "why": why(service, run),
    }


def waiting(service: Service) -> list[dict[str, Any]]:
    """Every tenant's runs with requests that wait or run, the longest wait first: how many, and why."""
    queued = [run for run in service.state.runs.values() if run.pending and run.status != "closed"]
    queued.sort(key=lambda run: run.last_request)
    return [{"run": run.id, "pending": run.pending, "why": why(service, run)} for run in queued]


def next_seq(service: Service, run: Run) -> int:
    return service.ledger.seen.next_seq(run.id)


def points(run: Run, start: int) -> dict[str, list[float | None]]:
    """The columns of a run's curve from point number ``start`` on; one point per optimizer step."""
    return {name: run.curve[name][start:] for name in CURVE_COLUMNS}


def why(service: Service, run: Run) -> str:
    """One sentence: what a run waits for, or what went wrong with it."""
    if run.status == "failed":
        return f"it could not be started: {run.error}"
    if run.status == "closed":
        return "it was unloaded; its checkpoints can be loaded into a new run"
    if service.quotas.paused(run.tenant):
        allowed = service.quotas.allowed(run.tenant, (Work.TRAINING, run.base_model))
        return f"your requests are held back: this server lets you have {allowed} (rps_limit, tps_limit)"
    if not run.pending:
        if run.last_error:
            return f"its last request failed: {run.last_error}"
        return "nothing is asked of it: the next request comes from your program"
    if not _offered(service, run):
        return f"its base model {run.base_model} is not on offer any more; add it with `%tuft init {run.base_model}`"
    driver = service.driver(run.base_model)
    if driver.status == "failed":
        return f"{run.base_model} cannot be trained: {driver.detail}"
    if driver.status != "ready":
        return driver.detail or f"loading {run.base_model}: the training worker is starting"
    others = sum(1 for lane in driver.lanes.by_run.values() if lane.queue and lane.run != run.id)
    queued = f"{run.pending} of its requests {'is' if run.pending == 1 else 'are'} accepted"
    if others:
        return f"{queued}; {others} other run{'s share' if others > 1 else ' shares'} the engine, in turns"
    return f"{queued}, and the engine works on nothing else"


def _offered(service: Service, run: Run) -> bool:
    try:
        service.catalog.resolve(run.base_model)
    except UserError:
        return False
    return True


def _rate(run: Run) -> float | None:
    times, tokens = run.curve["time"][-RATE_STEPS:], run.curve["tokens"][-RATE_STEPS:]
    if len(times) < 2 or times[0] is None or times[-1] is None or times[-1] <= times[0]:
        return None
    return sum(count or 0 for count in tokens[1:]) / (times[-1] - times[0])
