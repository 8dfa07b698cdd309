"""The service with a scripted engine: whose things are whose, and how long they live."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.scripted_engine import OneModel
from tests.support.world import ALICE, BOB, LORA, World, scenario, stepped, until, world
from tuft_jupyter.core.errors import NotFound, UserError
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.quotas import Limits
from tuft_jupyter.core.types import AdamParams, CheckpointKind
from tuft_jupyter.core.views import state_view


def test_what_is_not_yours_is_not_there_and_a_refusal_changes_nothing(tmp_path: Path) -> None:
    """S1-01, T2: every verb on a foreign run, session, sampler or checkpoint is refused without a trace."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            service = w.service
            session = service.state.runs[run].session
            saved = await service.runs.save_weights(ALICE, run, 90, "s", CheckpointKind.TRAINING, b"s")
            await w.answer(saved)
            path = f"tinker://{run}/weights/s"
            sampler = await service.sampling.open(ALICE, session, 0, OneModel.card, None)
            before = state_view(service.state)
            runs = service.runs
            refused: list[Callable[[], Awaitable[object]]] = [
                lambda: runs.forward_backward(BOB, run, 1, 8, b"b:8", "x", backward=True),
                lambda: runs.optim_step(BOB, run, 1, AdamParams(), b""),
                lambda: runs.save_weights(BOB, run, 1, "n", CheckpointKind.TRAINING, b""),
                lambda: runs.save_for_sampling_session(BOB, run, 1, 1, b""),
                lambda: runs.load_weights(BOB, run, 1, path, False, b""),
                lambda: runs.unload(BOB, run, b""),
                lambda: runs.create_model(BOB, session, 5, "tiny", LORA, {}, b""),
                lambda: service.finish_session(BOB, session, "success", None),
                lambda: service.checkpoints.delete(BOB, path),
                lambda: service.checkpoints.change(BOB, path, {"public": True}),
                lambda: service.sampling.open(BOB, session, 0, OneModel.card, None),
            ]
            for attempt in refused:
                with pytest.raises(NotFound):
                    await attempt()
            with pytest.raises(NotFound):
                service.sampling.submit(BOB, sampler.id, 0, b"")
            bobs = await service.sessions.open(BOB, {})
            with pytest.raises(NotFound):
                await runs.load_new_model(BOB, bobs, 0, path, False, {}, b"")
            after = state_view(service.state, "alice")
            assert {**after, "n": 0} == {**before, "n": 0}

    scenario(body)


def test_checkpoints_of_a_former_place_are_read_there_and_new_ones_go_to_the_present_one(
    tmp_path: Path,
) -> None:
    """X4: a server that kept them in TuFT's old default, and is told nothing of it any more."""
    journal, old = tmp_path / "journal", tmp_path / ".cache" / "tuft" / "checkpoints"

    async def save(w: World, run: str, name: str) -> Path:
        w.seq += 1
        asked = await w.service.runs.save_weights(
            ALICE, run, w.seq, name, CheckpointKind.TRAINING, name.encode()
        )
        assert not (await w.answer(asked)).category
        return Path(w.service.state.checkpoints[f"tinker://{run}/weights/{name}"].directory)

    async def body() -> None:
        async with world(tmp_path, journal=SqliteJournal(journal)) as w:
            w.service.checkpoints.root = old
            run = await w.connect()
            await w.train(run, 2)
            first = await save(w, run, "first")
            assert first.parent == old
        async with world(tmp_path, journal=SqliteJournal(journal)) as w:
            w.seq = 100
            path = f"tinker://{run}/weights/first"
            session = await w.service.sessions.open(ALICE, {"tags": []})
            loaded = await w.service.runs.load_new_model(ALICE, session, 0, path, True, {}, b"load")
            assert not (await w.answer(loaded)).category
            assert w.service.state.runs[f"{session}:train:0"].step == 2
            assert (await save(w, f"{session}:train:0", "second")).parent == tmp_path / "checkpoints"
            await w.train(f"{session}:train:0", 3)  # with a snapshot: it stands on its own now
            await until(lambda: not w.service.state.runs[f"{session}:train:0"].sources)
            await w.service.checkpoints.delete(ALICE, path)
            await w.service.sweep(0.0)
            assert not first.exists()

    scenario(body)


def test_deleting_one_kind_of_checkpoint_leaves_the_other_of_the_same_name(tmp_path: Path) -> None:
    """M8."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            for seq, kind in ((1, CheckpointKind.TRAINING), (2, CheckpointKind.SAMPLER)):
                await w.answer(
                    await w.service.runs.save_weights(ALICE, run, seq, "same", kind, kind.encode())
                )
            training = w.service.checkpoints.readable(ALICE, f"tinker://{run}/weights/same")
            await w.service.checkpoints.delete(ALICE, f"tinker://{run}/sampler_weights/same")
            assert (Path(training.directory) / "run.json").exists()
            assert list(w.service.state.checkpoints) == [training.path]

    scenario(body)


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", ".hidden", "x" * 200, "nul\0", "é"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    """M1, H6."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            with pytest.raises(UserError, match="path"):
                await w.service.runs.save_weights(ALICE, run, 1, name, CheckpointKind.TRAINING, b"")

    scenario(body)


def test_resuming_with_the_optimizer_needs_a_training_checkpoint(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 2)
            for seq, kind in ((91, CheckpointKind.TRAINING), (92, CheckpointKind.SAMPLER)):
                await w.answer(await w.service.runs.save_weights(ALICE, run, seq, "a", kind, kind.encode()))
            session = w.service.state.runs[run].session
            load = w.service.runs.load_new_model
            with pytest.raises(UserError, match="no optimizer state"):
                await load(ALICE, session, 1, f"tinker://{run}/sampler_weights/a", True, {}, b"")
            await w.answer(await load(ALICE, session, 1, f"tinker://{run}/weights/a", True, {}, b""))
            resumed = w.service.state.runs[f"{session}:train:1"]
            assert resumed.step == 2
            assert w.engines.trainer.runs[resumed.id] == stepped(passes)

    scenario(body)


def test_an_ephemeral_save_opens_its_sampler_and_a_lost_sample_worker_is_tried_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.answer(await w.service.runs.save_for_sampling_session(ALICE, run, 1, 4, b""))
            sampler = w.service.state.samplers[run.replace(":train:0", ":sample:4")]
            w.engines.sampler.dies = 1
            request = w.service.sampling.submit(ALICE, sampler.id, 0, b"{}")
            assert w.service.sampling.submit(ALICE, sampler.id, 0, b"{}") == request
            assert (await w.answer(request)).body == str(sampler.directory).encode()

    scenario(body)


def test_spent_ephemeral_weights_leave_the_disk_and_the_newest_stay(tmp_path: Path) -> None:
    """An RL loop saves weights every step: the disk holds a bounded number of them, and none after the session."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            session = w.service.state.runs[run].session
            for number in range(40):
                saved = await w.service.runs.save_for_sampling_session(
                    ALICE, run, 100 + number, number, b"%d" % number
                )
                await w.answer(saved)
            await w.service.sweep(w.service.ledger.clock())
            assert len(list((tmp_path / "ephemeral").iterdir())) == w.service.limits.ephemeral_per_session
            newest = w.service.sampling.submit(ALICE, f"{session}:sample:39", 0, b"{}")
            assert not (await w.answer(newest)).category
            with pytest.raises(NotFound, match="save them again"):
                w.service.sampling.submit(ALICE, f"{session}:sample:0", 0, b"{}")
            await w.service.finish_session(ALICE, session, "success", None)
            await w.service.sweep(w.service.ledger.clock())
            assert not list((tmp_path / "ephemeral").iterdir())

    scenario(body)


def test_weights_stay_between_two_heartbeats_however_soon_adapters_leave(tmp_path: Path) -> None:
    """S2-45: the SDK is heard of every ten seconds; a sampler may load in between."""

    async def body() -> None:
        async with world(tmp_path, limits=Limits(idle_timeout=2.0)) as w:
            now = [w.service.ledger.clock()]
            w.service.ledger.clock = lambda: now[0]
            run = await w.connect()
            await w.answer(await w.service.runs.save_for_sampling_session(ALICE, run, 100, 0, b"weights"))
            lane = w.service.drivers["tiny"].lanes.by_run[run]
            for _ in range(2):
                now[0] += 10
                await w.service.sweep(now[0])
            await until(lambda: not lane.resident)
            drawn = w.service.sampling.submit(ALICE, f"{run.split(':')[0]}:sample:0", 0, b"{}")
            assert not (await w.answer(drawn)).category
            now[0] += 11
            await w.service.sweep(now[0])
            assert not list((tmp_path / "ephemeral").iterdir())

    scenario(body)


def test_a_finished_session_frees_its_adapters_and_takes_no_more_work(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 1)
            await w.service.finish_session(ALICE, w.service.state.runs[run].session, "success", None)
            await until(lambda: not w.engines.trainer.runs)
            with pytest.raises(UserError, match="finished"):
                await w.forward_backward(run)
            assert w.service.state.runs[run].snapshot is not None

    scenario(body)


def test_an_expired_checkpoint_is_deleted_and_an_idle_adapter_leaves(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 2)
            kind = CheckpointKind.TRAINING
            await w.answer(await w.service.runs.save_weights(ALICE, run, 91, "a", kind, b"", ttl=60.0))
            now = w.service.ledger.clock()
            await w.service.sweep(now + 30)
            assert w.service.state.checkpoints
            await w.service.sweep(now + 2000)
            assert not w.service.state.checkpoints
            await until(lambda: not w.engines.trainer.runs)
            more = await w.train(run, 1)
            assert w.trained == stepped([*passes, *more])

    scenario(body)
