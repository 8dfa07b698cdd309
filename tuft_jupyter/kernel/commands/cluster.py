"""The Ray behind the server: its nodes and GPUs, what is placed where, and how a cluster is started."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from tuft_jupyter.kernel import connect
from tuft_jupyter.kernel.commands.command import Command, Text
from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence
from tuft_jupyter.kernel.report import Grid

WHAT = ("status", "head-command", "worker-command")


def _ray(arguments: argparse.Namespace) -> Any:
    connection = connect.current()
    if connection is None:
        raise TuftConnectionError("This kernel is not connected: `%tuft init` connects.")
    with in_a_sentence(connection.client):
        found = connection.client.ray()
    if arguments.what == "status":
        return ray_grid(found)
    return Text(found["commands"][arguments.what.partition("-")[0]])


def ray_grid(found: Mapping[str, Any]) -> Grid:
    """One row per node, with the processes that have a place there."""
    if found["address"] is None:
        return Grid("Ray is not running: it starts with the first model that is used", (), ())
    there: dict[str, list[str]] = {node["id"]: [] for node in found["nodes"]}
    for placed in found["placements"]:
        for process in placed["processes"]:
            gpus = ",".join(process["gpus"])
            text = f"{placed['model']} {process['role']} {process['rank']} (GPU {gpus})"
            there.setdefault(process["node"], []).append(text)
    rows = [
        (
            node["ip"],
            node["id"][:8],
            f"{node['gpus']:g}",
            f"{node['free_gpus']:g}",
            "; ".join(there[node["id"]]),
        )
        for node in found["nodes"]
    ]
    gpus = sum(node["gpus"] for node in found["nodes"])
    title = f"Ray: {found['address']}, {len(rows)} node{'' if len(rows) == 1 else 's'}, {gpus:g} GPUs"
    return Grid(title, ("node", "id", "GPUs", "free", "placed"), rows, found["why"] or "")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=WHAT,
        default="status",
        help="status: nodes, GPUs and what is placed where (the default); head-command, worker-command: what starts a "
        "cluster with the server's machine as its head",
    )


RAY = Command(
    "ray",
    "nodes and GPUs of the Ray behind the server, and what is placed where",
    _ray,
    _options,
    example="%tuft ray status",
    complete=lambda: list(WHAT),
)
