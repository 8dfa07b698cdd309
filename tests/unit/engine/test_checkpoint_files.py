"""Checkpoints on the disk: there for good when they are saved, and nothing of one that was cut short stays."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from pathlib import Path

import pytest

from tests.support.power import Power
from tuft_jupyter.core.checkpoints import Checkpoints
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Quotas
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import checkpoint
from tuft_jupyter.engine.trainer import PeftTrainer


@pytest.fixture
def trainer(qwen3: Path) -> PeftTrainer:
    made = PeftTrainer(qwen3)
    made.create("run", LoraSpec(rank=4, alpha=8, seed=1))
    return made


def test_a_checkpoint_is_on_the_disk_when_it_is_saved_names_and_all(
    trainer: PeftTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: a snapshot is the first in its run's directory, and the ops it stands for are dropped from the journal."""
    power = Power(monkeypatch)
    directory = tmp_path / "snapshots" / "run" / "one"
    trainer.save("run", directory, optimizer=True)
    assert power.lost(directory, tmp_path) == []


def test_what_a_save_leaves_that_was_cut_short_is_removed_when_nobody_can_be_writing_it(
    trainer: PeftTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L7: each kill -9 in the middle of a save would leave as much as a checkpoint."""
    root, moment = tmp_path / "checkpoints", time.time()
    trainer.save("run", root / uuid.uuid4().hex, optimizer=False)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **more: None)  # as if it had died
    monkeypatch.setattr(checkpoint, "sync_all", lambda path: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            trainer.save("run", root / uuid.uuid4().hex, optimizer=True)
    monkeypatch.undo()
    new, old = sorted(root.glob(".*"))
    (root / ".snapshot").mkdir()
    for directory in root.iterdir():
        if directory != new:
            os.utime(directory, (moment - 90_000, moment - 90_000))
    asyncio.run(Checkpoints(Ledger(MemoryJournal()), root, lambda session, now: False, Quotas()).clear(root))
    assert not old.exists()
    assert len(list(root.iterdir())) == 3
    assert new.is_dir()
