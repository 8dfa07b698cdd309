"""A server whose directories were moved while it was stopped."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from tests.support.logs import messages
from tests.support.scripted_engine import ScriptedEngines
from tests.support.world import ALICE, World, scenario, stepped, world
from tuft_jupyter.core.errors import NotFound
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import CheckpointKind, Principal


async def sampled(w: World, path: str, seq: int, who: Principal = ALICE) -> str:
    """The directory a checkpoint's weights are sampled from."""
    session = await w.service.sessions.open(who, {})
    card = w.service.card
    weights = w.service.checkpoints.readable(who, path)
    sampler = await w.service.sampling.open(who, session, seq, await card(who, "tiny"), weights)
    answer = await w.answer(w.service.sampling.submit(who, sampler.id, 0, b""), who)
    return (answer.body or b"").decode()


def test_what_was_moved_is_found_where_it_is_now(tmp_path: Path) -> None:
    """Checkpoints, snapshots and what a replay loads: the run goes on, also when its home has another name."""

    async def body() -> None:
        old, new, journal = tmp_path / "old", tmp_path / "new", tmp_path / "journal.sqlite"
        async with world(old, journal=SqliteJournal(journal)) as first:
            run = await first.connect()
            passes = await first.train(run, 4)
            saved = await first.service.runs.save_weights(ALICE, run, 90, "s", CheckpointKind.TRAINING, b"s")
            assert not (await first.answer(saved)).category
            path = f"tinker://{run}/weights/s"
            assert (await sampled(first, path, 0)).startswith(f"{old}/")
        shutil.move(old, new)

        async with world(new, journal=SqliteJournal(journal)) as second:
            second.seq = 100
            more = await second.train(run, 2)
            assert second.trained == stepped([*passes, *more])
            assert (await sampled(second, path, 1)).startswith(f"{new}/checkpoints/")
            loaded = await second.service.runs.load_weights(ALICE, run, 190, path, False, b"l")
            assert not (await second.answer(loaded)).category
            assert second.trained == stepped(passes)
            await second.service.checkpoints.delete(ALICE, path)
            assert not old.exists()

    scenario(body)


def test_a_load_that_waited_while_its_files_moved_is_run(tmp_path: Path) -> None:
    """F2: what was acknowledged is done, though the journal tells its old place."""

    async def body() -> None:
        old, new, journal = tmp_path / "old", tmp_path / "new", tmp_path / "journal.sqlite"
        engines = ScriptedEngines()
        async with world(old, journal=SqliteJournal(journal), engines=engines) as first:
            run = await first.connect()
            passes = await first.train(run, 1)
            saved = await first.service.runs.save_weights(ALICE, run, 90, "s", CheckpointKind.TRAINING, b"s")
            assert not (await first.answer(saved)).category
            engines.trainer.gate.clear()
            path = f"tinker://{run}/weights/s"
            waiting = await first.service.runs.load_weights(ALICE, run, 91, path, False, b"l")
        shutil.move(old, new)

        engines.trainer.gate.set()
        async with world(new, journal=SqliteJournal(journal), engines=engines) as second:
            assert not (await second.answer(waiting)).category
            assert second.trained == stepped(passes)

    scenario(body)


def below(directory: str) -> Path:
    """Where a directory that is on disk lies."""
    assert Path(directory).is_dir()
    return Path(directory).parent


def test_a_save_that_waited_is_written_below_the_directories_of_today(tmp_path: Path) -> None:
    """F2: a checkpoint, and weights for a sampler without a name."""

    async def body() -> None:
        old, new, journal = tmp_path / "old", tmp_path / "new", tmp_path / "journal.sqlite"
        engines = ScriptedEngines()
        async with world(old, journal=SqliteJournal(journal), engines=engines) as first:
            run = await first.connect()
            await first.train(run, 1)
            engines.trainer.gate.clear()
            runs = first.service.runs
            kept = await runs.save_weights(ALICE, run, 90, "s", CheckpointKind.TRAINING, b"s")
            drawn = await runs.save_for_sampling_session(ALICE, run, 91, 0, b"e")

        engines.trainer.gate.set()
        async with world(new, journal=SqliteJournal(journal), engines=engines) as second:
            for waiting in (kept, drawn):
                assert not (await second.answer(waiting)).category
            (saved,) = second.service.state.checkpoints.values()
            (sampler,) = second.service.state.samplers.values()
            assert below(saved.directory) == new / "checkpoints"
            assert below(sampler.directory or "") == new / "ephemeral"

    scenario(body)


def test_checkpoints_that_lie_nowhere_are_told_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        journal = tmp_path / "journal.sqlite"
        async with world(tmp_path, journal=SqliteJournal(journal)) as first:
            run = await first.connect()
            saved = await first.service.runs.save_weights(ALICE, run, 90, "s", CheckpointKind.TRAINING, b"s")
            await first.answer(saved)
        shutil.rmtree(tmp_path / "checkpoints")
        with caplog.at_level(logging.WARNING, "tuft_jupyter.service"):
            async with world(tmp_path, journal=SqliteJournal(journal)) as second:
                with pytest.raises(NotFound, match="not on disk any more"):
                    await sampled(second, f"tinker://{run}/weights/s", 0)
        (told,) = messages(caplog)
        assert "1 of 1 checkpoints" in told
        assert "set checkpoint_dir" in told

    scenario(body)
