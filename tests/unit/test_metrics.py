"""A curve as a file that other tools read."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tuft_jupyter import metrics

COLUMNS = {
    "step": [1, 2, 3],
    "time": [1.7e9, 1.7e9 + 1, 1.7e9 + 2.5],
    "loss": [2.5, None, 0.25],
    "tokens": [64, 64, 32],
}


def scalars(content: bytes) -> list[tuple[str, int, float, float]]:
    """(tag, step, time, value) of each record of an event file, by TensorBoard's own message."""
    from tensorboardX.proto.event_pb2 import Event

    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(v.tag, event.step, event.wall_time, v.simple_value) for v in event.summary.value]
        at += 12 + length + 4
    return found


def test_csv_has_a_row_per_step_and_nothing_where_there_is_no_value() -> None:
    rows = list(csv.reader(io.StringIO(metrics.as_csv("a:train:0", COLUMNS).decode())))
    assert rows[0] == ["run", "step", "time", "loss", "tokens"]
    assert [row[3] for row in rows[1:]] == ["2.5", "", "0.25"]


def test_json_lines_say_the_same() -> None:
    rows = [json.loads(line) for line in metrics.as_jsonl("a:train:0", COLUMNS).splitlines()]
    assert [row["loss"] for row in rows] == [2.5, None, 0.25]
    assert {row["run"] for row in rows} == {"a:train:0"}


def test_tensorboard_gets_each_value_at_its_step_and_time() -> None:
    found = scalars(metrics.events("a:train:0", COLUMNS))
    assert [each for each in found if each[0] == "loss"] == [
        ("loss", 1, 1.7e9, 2.5),
        ("loss", 3, 1.7e9 + 2.5, 0.25),
    ]
    assert len([each for each in found if each[0] == "tokens"]) == 3


def test_a_server_writes_events_without_importing_what_they_need() -> None:
    """S3-01: in a process of its own; a missing package is a sentence."""
    script = (
        "import sys; from tuft_jupyter import metrics; "
        f"metrics.events_elsewhere('r', {COLUMNS!r}); "
        "assert not {'torch', 'tensorboardX'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_without_tensorboardx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(metrics.CannotExport, match="pip install"):
        metrics.events("r", COLUMNS)


def test_files_are_named_as_their_readers_expect() -> None:
    assert metrics.file_name("6f1c2a52:0", "csv") == "6f1c2a52-0.csv"
    assert "tfevents" in Path(metrics.file_name("6f1c2a52:0", "tensorboard")).name
