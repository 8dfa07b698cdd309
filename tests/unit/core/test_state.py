"""State is a fold of records; the lab's model.ts is tested on the same golden files."""

from __future__ import annotations

import json
from pathlib import Path

from tuft_jupyter.core import state as fold
from tuft_jupyter.core.types import Record
from tuft_jupyter.core.views import record_view, state_view

GOLDEN = Path(__file__).parents[2] / "golden"


def records() -> list[Record]:
    lines = (GOLDEN / "journal.jsonl").read_text().splitlines()
    return [Record(**json.loads(line)) for line in lines]


def test_folding_the_golden_journal_gives_the_golden_state() -> None:
    shown = state_view(fold.fold(records()))
    assert shown == json.loads((GOLDEN / "state.json").read_text())


def test_the_feed_shows_no_directory_and_no_digest() -> None:
    shown = [record_view(record) for record in records()]
    assert shown == [json.loads(line) for line in (GOLDEN / "feed.jsonl").read_text().splitlines()]
    assert "directory" not in json.dumps(shown)
    assert "digest" not in json.dumps(shown)


def test_a_copy_of_weights_is_folded_as_the_browser_does() -> None:
    golden = json.loads((GOLDEN / "copied.json").read_text())
    record = Record(**golden["record"])
    assert state_view(fold.fold([record])) == golden["state"]
    assert record_view(record) == golden["feed"]
    assert "directory" not in json.dumps(golden["feed"])


def test_what_was_forgotten_is_gone_as_in_the_browser() -> None:
    golden = json.loads((GOLDEN / "forgotten.json").read_text())
    gone = [Record(**record) for record in golden["records"]]
    assert state_view(fold.fold([*records(), *gone])) == golden["state"]
    assert [record_view(record) for record in gone] == golden["records"]


def test_a_tenant_sees_only_its_own() -> None:
    shown = state_view(fold.fold(records()), "bob")
    owners = {
        item["tenant"] for kind in ("sessions", "runs", "samplers", "checkpoints") for item in shown[kind]
    }
    assert owners == {"bob"}


def test_a_record_of_a_later_version_changes_nothing_but_n() -> None:
    state = fold.State()
    fold.apply(state, Record("a_kind_of_a_later_version", "alice", {"x": 1}, n=7))
    assert state_view(state) == {**state_view(fold.State()), "n": 7}


def test_replay_starts_at_the_snapshot_and_holds_what_was_done_since() -> None:
    state = fold.fold(records())
    run = next(run for run in state.runs.values() if run.tenant == "alice")
    done_after = [
        record.n
        for record in records()
        if record.kind == "op_accepted" and record.n > run.covers and record.data["op"] == "forward_backward"
    ]
    assert run.snapshot == "d"
    assert run.replay == [n for n in done_after if n not in state.accepted.values()]
