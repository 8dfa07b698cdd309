"""``tuft runs``, ``tuft export`` and ``tuft stop``: what runs on a server, its curves as files, and its end."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tuft_jupyter import metrics

STOP_SECONDS = 60.0
ADDRESS = "of the server (default: the one that %%tuft init finds)"


def add_parsers(verbs: Any) -> None:
    runs = verbs.add_parser("runs", help="your runs on the running server: state, step, loss")
    runs.add_argument("--address", metavar="URL", help=ADDRESS)
    runs.add_argument("--all", action="store_true", help="everybody's, with whose they are (admins only)")
    export = verbs.add_parser("export", help="the metrics of a run as a file")
    export.add_argument(
        "run", nargs="?", help="its id, as `tuft runs` shows it (default: the run that was busy last)"
    )
    export.add_argument("--format", choices=tuple(metrics.FORMATS), default="csv", help="(default: csv)")
    export.add_argument("--output", "-o", metavar="FILE", help="where to (default: here; - for the terminal)")
    export.add_argument("--address", metavar="URL", help=ADDRESS)
    stop = verbs.add_parser("stop", help="stop the server that `tuft launch` started")
    stop.add_argument("--address", metavar="URL", help="which, if there is more than one")


def runs(options: argparse.Namespace) -> int:
    from tuft_jupyter.kernel import continuity
    from tuft_jupyter.kernel.commands.running import run_grid
    from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence

    client = _client(options.address)
    with in_a_sentence(client):
        if options.all and not client.status()["admin"]:
            raise TuftConnectionError(
                "--all is for admins, and this key is none's: `tuft runs` shows your own"
            )
    found = continuity.runs(client, "*" if options.all else "")
    title = f"{len(found)} run{'' if len(found) == 1 else 's'} at {client.address}"
    print(run_grid(found, title, tenants=options.all))
    return 0


def export(options: argparse.Namespace) -> int:
    from tuft_jupyter.kernel import continuity
    from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence

    client = _client(options.address)
    run = continuity.find(client, options.run)["id"]
    with in_a_sentence(client):
        columns = client.curve(run)
    try:
        content = metrics.FORMATS[options.format][1](run, columns)
    except metrics.CannotExport as problem:
        raise TuftConnectionError(str(problem)) from None
    if options.output == "-":
        sys.stdout.buffer.write(content)
        return 0
    target = Path(options.output or metrics.file_name(continuity.short(run), options.format))
    try:
        target.write_bytes(content)
    except OSError as error:
        raise TuftConnectionError(
            f"{target} cannot be written ({error.strerror}); name a file with --output FILE"
        ) from None
    print(f"{target} ({len(columns['step'])} steps of {run})")
    return 0


def stop(options: argparse.Namespace) -> int:
    """Ask the daemon to end (SIGTERM), and wait until it has."""
    from tuft_jupyter.kernel.client import normal
    from tuft_jupyter.kernel.discovery import daemon_processes
    from tuft_jupyter.kernel.errors import TuftConnectionError

    found = {address: process for process, address in daemon_processes()}
    wanted = normal(options.address) if options.address else None
    chosen = [wanted] if wanted in found else [] if wanted else list(found)
    if len(chosen) != 1:
        listed = ", ".join(found) or "none"
        raise TuftConnectionError(
            f"say which server: `tuft stop --address URL`, one of {listed}"
            if chosen
            else f"no `tuft launch` of yours runs{f' at {wanted}' if wanted else ''} (running: {listed}); "
            "a notebook server is stopped with `jupyter server stop`"
        )
    (address,) = chosen
    process = found[address]
    process.terminate()
    print(f"tuft: {address} finishes what it does ...", flush=True)
    deadline = time.monotonic() + STOP_SECONDS
    while _lives(process):
        if time.monotonic() > deadline:
            raise TuftConnectionError(
                f"{address} has not ended within {STOP_SECONDS:.0f} s; end it with `kill -9 {process.pid}`"
            )
        time.sleep(0.1)
    print(f"tuft: {address} is stopped")
    return 0


def _lives(process: Any) -> bool:
    """Whether it still runs; one that ended and was not yet reaped by its parent does not."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _client(address: str | None) -> Any:
    from tuft_jupyter.kernel.discovery import discover
    from tuft_jupyter.kernel.errors import TuftConnectionError

    found = discover(address, None, note=lambda text: print(f"tuft: {text}", file=sys.stderr))
    if found is None:
        raise TuftConnectionError("no server is running; `tuft launch` starts one")
    return found.client
