"""Runs: what there is, what ran meanwhile, going on, and why nothing moves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tuft_jupyter.kernel import connect, continuity
from tuft_jupyter.kernel.client import Client
from tuft_jupyter.kernel.commands.command import Command
from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence
from tuft_jupyter.kernel.report import Grid, Table, ago, number

COLUMNS = ("run", "base model", "state", "step", "loss", "tokens/s", "last request")
NONE = "tuft_jupyter.create_training_client(rank=8).result() starts one"
HERE = "in this notebook: training = %tuft resume RUN"


def run_grid(runs: Iterable[Mapping[str, Any]], title: str, foot: str = "", *, tenants: bool = False) -> Grid:
    """Runs as a table; ``tenants``: with whose they are."""
    rows = [((run["tenant"],) if tenants else ()) + _row(run, time.time()) for run in runs]
    return Grid(title, (("tenant",) if tenants else ()) + COLUMNS, rows, foot)


def _row(run: Mapping[str, Any], now: float) -> tuple[object, ...]:
    state = f"{run['status']}, {run['pending']} waiting" if run["pending"] else run["status"]
    rate = number(run["tokens_per_second"]) if run["pending"] else ""
    asked = f"{ago(now - run['last_request'])} ago" if run["last_request"] else ""
    return (
        continuity.short(run["id"]),
        run["base_model"],
        state,
        run["step"],
        number(run["loss"]),
        rate,
        asked,
    )


def _runs(_: argparse.Namespace) -> Grid:
    found = continuity.runs()
    return run_grid(found, f"{len(found)} run{'' if len(found) == 1 else 's'}", HERE if found else NONE)


def _attach(_: argparse.Namespace) -> Grid:
    """What went on while no kernel looked: the newest runs, those at work first."""
    found = sorted(continuity.runs(), key=lambda run: run["status"] in continuity.GONE)
    busy = [run for run in found if run["pending"]]
    live = [run for run in found if run["status"] not in continuity.GONE]
    if not found:
        return Grid("Nothing ran: there is no run of yours yet.", (), ())
    title = f"{len(live)} of {len(found)} runs can go on; {len(busy)} at work"
    first = continuity.short(found[0]["id"])
    return run_grid(found, title, f"go on with the first: training = %tuft resume {first}")


def _resume(arguments: argparse.Namespace) -> Any:
    return continuity.resume(arguments.run)


def _why(arguments: argparse.Namespace) -> Table:
    """One sentence each: the connection, the server, and the run that is meant or those that are waited for."""
    connection = connect.current()
    if connection is None:
        return Table(
            "Nothing moves: this kernel is not connected", [("next", "%tuft init connects, or says why not")]
        )
    status = connection.status()
    if status is None:
        raise TuftConnectionError(
            f"{connection.address} is no TuFT server of this kind; it does not say why it waits."
        )
    with in_a_sentence(connection.client):
        runs = _meant(connection.client, arguments.run)
    waits = str(status.get("waiting_for") or "")
    if any(run["pending"] and run["why"] in waits for run in runs):
        status = {**status, "waiting_for": None}  # the run says it
    rows = list(_of_server(status))
    rows += [(f"run {continuity.short(run['id'])}", run["why"]) for run in runs]
    return Table("Why", rows or [("runs", "there is none of yours yet: nothing was asked of this server")])


def _of_server(status: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    backend = status.get("backend") or {}
    if not backend.get("installed", True):
        yield "server", str(backend.get("detail"))
    if status.get("waiting_for"):
        yield "server", f"waits: {status['waiting_for']}"
    for model in status.get("models") or []:
        if model.get("state") == "failed":
            yield f"model {model['name']}", f"cannot be loaded: {model.get('detail')}"


def _meant(client: Client, name: str | None) -> list[dict[str, Any]]:
    if name is not None:
        return [continuity.find(client, name)]
    runs = continuity.runs(client)
    return [run for run in runs if run["pending"]] or runs[:1]


def _one_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", help="its id, as %%tuft runs shows it (default: the run that was busy last)"
    )


def _known() -> list[str]:
    connection = connect.current()
    if connection is None:
        return []
    try:
        return [continuity.short(run["id"]) for run in continuity.runs(connection.client)]
    except TuftConnectionError:
        return []


RUNS = Command("runs", "your runs on this server: state, step, loss", _runs)
ATTACH = Command(
    "attach",
    "what ran while this notebook was closed, and how to go on",
    _attach,
    description="What ran while this notebook was closed. Training goes on in the server; nothing was lost.",
)
RESUME = Command(
    "resume",
    "a TrainingClient at the next step of a run",
    _resume,
    _one_run,
    description="A TrainingClient at the next step of a run: the same run if it is live, else a new one from its "
    "newest saved state.",
    example="training = %tuft resume 6f1c2a52:0",
    complete=_known,
    returns=True,
)
WHY = Command(
    "why",
    "one sentence on why nothing moves, or what went wrong",
    _why,
    _one_run,
    example="%tuft why",
    complete=_known,
)
