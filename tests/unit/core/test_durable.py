"""What is on record as saved is on the disk, names and all: a power failure takes nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.power import Power
from tests.support.world import ALICE, scenario, world
from tuft_jupyter.core import durable
from tuft_jupyter.core.types import CheckpointKind
from tuft_jupyter.engine.remote import kept_there
from tuft_jupyter.engine.remote.kept_there import KeptThere


def test_a_new_directory_and_all_above_it_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch)
    directory = tmp_path / "a" / "b" / "c"
    durable.make(directory)
    durable.make(directory)
    (directory / "file").write_text("content")
    assert power.lost(directory, tmp_path) == [str(directory / "file"), f"the name of {directory / 'file'}"]
    durable.sync_all(directory)
    assert power.lost(directory, tmp_path) == []


def test_a_copy_of_a_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source may be deleted the next moment."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            saved = await w.service.runs.save_weights(ALICE, run, 1, "one", CheckpointKind.TRAINING, b"save")
            assert not (await w.answer(saved)).category
            (source,) = w.service.checkpoints.mine(ALICE)
            session = w.service.sessions.mine(ALICE)[0]
            power = Power(monkeypatch)
            path = await w.service.checkpoints.copy(source, session, f"{session.id}:train:9", None)
            copied = Path(w.service.state.checkpoints[path].directory)
            assert power.lost(copied, copied.parent) == []

    scenario(body)


def test_a_note_of_weights_elsewhere_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be all that is left of a run: the ops that it stands for are dropped from the journal."""
    power = Power(monkeypatch)
    directory = tmp_path / "snapshots" / "run" / "one"
    made = kept_there.beside(directory)
    kept_there.write(made, KeptThere("http://there", "tinker://a/weights/b"))
    kept_there.finish(made, directory)
    assert power.lost(directory, tmp_path) == []
