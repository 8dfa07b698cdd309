"""Saved weights: list, download, keep, delete."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tuft_jupyter.kernel import connect, continuity
from tuft_jupyter.kernel.client import Client
from tuft_jupyter.kernel.commands.command import Command, Text
from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence
from tuft_jupyter.kernel.report import Grid, Progress, ago, size

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "export"}
COLUMNS = ("path", "kind", "step", "size", "saved", "kept")


def checkpoint_grid(checkpoints: list[dict[str, Any]], title: str) -> Grid:
    now = time.time()
    rows = [
        (
            c["path"],
            KINDS.get(c["kind"], c["kind"]),
            c["step"],
            size(c["size_bytes"]),
            f"{ago(now - c['created'])} ago",
            "for good" if c["expires"] is None else f"for {ago(c['expires'] - now)}",
        )
        for c in checkpoints
    ]
    return Grid(title, COLUMNS, rows)


def listed(client: Client, run: str | None = None) -> list[dict[str, Any]]:
    """This user's checkpoints, the newest first; of one run, if it is named."""
    with in_a_sentence(client):
        found: list[dict[str, Any]] = client.outlook()["checkpoints"]
    if run is not None:
        wanted = continuity.find(client, run)["id"]
        found = [c for c in found if c["run"] == wanted]
    return sorted(found, key=lambda c: -c["created"])


def _checkpoints(arguments: argparse.Namespace) -> Any:
    client = continuity.connected().client
    if arguments.delete:
        path = _checked(client, arguments.delete)
        with in_a_sentence(client):
            client.checkpoint("DELETE", path)
        return Text(f"TuFT: {path} is deleted.")
    if arguments.download:
        return _download(client, _checked(client, arguments.download), Path(arguments.to))
    found = listed(client, arguments.run)
    return checkpoint_grid(found, f"{len(found)} checkpoint{'' if len(found) == 1 else 's'}")


def _checked(client: Client, path: str) -> str:
    """A path that is there; a name alone will do where it is the only one."""
    known = [c["path"] for c in listed(client)]
    matching = [each for each in known if path in (each, each.rpartition("/")[2])]
    if len(matching) == 1:
        return matching[0]
    which = "could be any of " + ", ".join(matching) if matching else "is no checkpoint of yours"
    raise TuftConnectionError(f"{path!r} {which}; `%tuft checkpoints` lists them with their whole paths.")


def _download(client: Client, path: str, folder: Path) -> Text:
    report = Progress("TuFT download")
    run, _, name = path.removeprefix("tinker://").split("/", 2)
    target = folder / f"{continuity.short(run).replace(':', '-')}-{name.replace('/', '-')}.tar"
    report("archive", f"{path}: the server packs it ...")
    try:
        with in_a_sentence(client):
            address = client.checkpoint("GET", path, "archive")["url"]
            for done in client.save(address, target):
                report("archive", f"{path}: {size(done)} ...")
    except OSError as error:
        raise TuftConnectionError(
            f"{target} cannot be written ({error.strerror}); say where the archive goes: --to DIR."
        ) from None
    report("archive", path)
    return Text(f"TuFT: {target} ({size(target.stat().st_size)}), a plain PEFT directory in a tar archive.")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="of this run only")
    parser.add_argument("--delete", metavar="PATH", help="delete this checkpoint, for good")
    parser.add_argument("--download", metavar="PATH", help="fetch it as a tar archive of a PEFT directory")
    parser.add_argument("--to", metavar="DIR", default=".", help="where the archive goes (default: here)")


def _known() -> list[str]:
    connection = connect.current()
    if connection is None:
        return []
    try:
        return [c["path"] for c in listed(connection.client)]
    except TuftConnectionError:
        return []


CHECKPOINTS = Command(
    "checkpoints",
    "saved weights: path, size, age; download or delete one",
    _checkpoints,
    _options,
    example="%tuft checkpoints --download tinker://RUN/weights/NAME",
    complete=_known,
)
