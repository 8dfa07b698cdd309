"""A run's curve as a file for other tools: CSV, JSON lines, or TensorBoard's events.

It gets columns (one entry per optimizer step) and knows nothing of where they come from. TensorBoard's format is
written by tensorboardX, which imports torch where that is installed; so a server runs this module as a process of its
own (:func:`events_elsewhere`), and only a command that ends anyway calls :func:`events` itself.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Columns = Mapping[str, Sequence[float | None]]

NO_TENSORBOARD = 'TensorBoard files need tensorboardX: pip install "tuft-jupyter[tensorboard]"'
SECONDS = 60.0


class CannotExport(RuntimeError):
    """The file cannot be written here; the text says what is missing."""


def as_csv(run: str, columns: Columns) -> bytes:
    """RFC 4180; nothing where a step has no value."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["run", *columns])
    for row in zip(*columns.values(), strict=True):
        table.writerow([run, *("" if value is None else value for value in row)])
    return text.getvalue().encode()


def as_jsonl(run: str, columns: Columns) -> bytes:
    """One JSON object per step."""
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return b"".join(json.dumps({"run": run, **row}).encode() + b"\n" for row in rows)


def events(run: str, columns: Columns) -> bytes:
    """The content of one TensorBoard event file: a scalar per metric and step, at its own time."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise CannotExport(NO_TENSORBOARD) from None
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(logdir=folder)
        for name, step, time, value in _scalars(columns):
            writer.add_scalar(name, value, global_step=step, walltime=time)
        writer.close()
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def events_elsewhere(run: str, columns: Columns) -> bytes:
    """The same, written by a process of its own: nothing heavy is imported here."""
    given = json.dumps([run, dict(columns)]).encode()
    command = [sys.executable, "-m", "tuft_jupyter.metrics"]
    done = subprocess.run(command, input=given, capture_output=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise CannotExport(done.stderr.decode(errors="replace").strip().splitlines()[-1])
    return done.stdout


FORMATS: dict[str, tuple[str, Callable[[str, Columns], bytes]]] = {
    "csv": ("csv", as_csv),
    "jsonl": ("jsonl", as_jsonl),
    "tensorboard": ("tfevents", events),
}
"""By name: how the file's name ends, and what writes it."""


def file_name(short: str, form: str) -> str:
    """What the file is called; TensorBoard knows its files by the word ``tfevents``."""
    stem = short.replace(":", "-")
    return f"events.out.tfevents.{stem}" if form == "tensorboard" else f"{stem}.{FORMATS[form][0]}"


def _scalars(columns: Columns) -> Iterator[tuple[str, int, float, float]]:
    for name, values in columns.items():
        if name in ("step", "time"):
            continue
        for step, time, value in zip(columns["step"], columns["time"], values, strict=True):
            if value is not None and step is not None and time is not None:
                yield name, int(step), time, value


def _main() -> int:
    run, columns = json.load(sys.stdin)
    try:
        sys.stdout.buffer.write(events(run, columns))
    except CannotExport as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
