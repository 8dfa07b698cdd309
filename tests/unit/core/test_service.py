"""The service with a scripted engine: order, once-only, and recovery from every kind of death."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.support.scripted_engine import ScriptedEngines
from tests.support.world import ALICE, BOB, LORA, World, scenario, stepped, until, world
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import ServerError, Unobtainable, UserError
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.snapshots import SnapshotRule
from tuft_jupyter.core.views import state_view


def test_pipelined_ops_run_once_and_in_order(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            passes = await w.train(run, 7)
            assert w.trained == stepped(passes)
            state = w.service.state.runs[run]
            assert (state.step, state.pending) == (7, 0)
            assert state.curve["loss"] == [2.0] * 7

    scenario(body)


def test_a_repeated_request_is_answered_again_and_not_run_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            runs = w.service.runs
            first = await runs.forward_backward(ALICE, run, 1, 8, b"b:8", "x", backward=True)
            again = await runs.forward_backward(ALICE, run, 1, 8, b"b:8", "x", backward=True)
            assert first == again
            assert (await w.answer(first)).body == b"done"
            assert (await w.answer(first)).body == b"done"
            assert w.trained == [first]
            with pytest.raises(UserError, match="seq_id 1"):
                await runs.forward_backward(ALICE, run, 1, 8, b"other:8", "x", backward=True)

    scenario(body)


def test_a_large_op_is_granted_in_parts_and_ends_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            request = await w.forward_backward(run, tokens=5000)
            assert (await w.answer(request)).body == b"done"
            assert w.trained == [request]
            assert sum(request in step for step in w.engines.trainer.steps) == 10

    scenario(body)


def test_a_step_follows_its_pass_without_waiting_for_the_answer(tmp_path: Path) -> None:
    """The engine has the optimizer step in hand when the pass ends; the answers keep their order."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            passed = await w.forward_backward(run)
            await until(lambda: w.engines.trainer.calls[-1] == [passed])
            step = await w.optim_step(run)
            await until(lambda: w.engines.trainer.calls[-1] == [step])
            later = await w.optim_step(run)
            assert w.engines.trainer.steps[-1] != [passed], "nothing was worked on yet"
            w.engines.trainer.gate.set()
            for request in (passed, step, later):
                assert not (await w.answer(request)).category
            assert w.trained == [passed, "step", "step"]

    scenario(body)


def test_a_step_whose_pass_dies_with_the_worker_is_run_once_after_it(tmp_path: Path) -> None:
    """F1: both were in the worker's hands."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            passed = await w.forward_backward(run)
            await until(lambda: w.engines.trainer.calls[-1] == [passed])
            step = await w.optim_step(run)
            await until(lambda: w.engines.trainer.calls[-1] == [step])
            w.engines.trainer.kill()
            w.engines.trainer.gate.set()
            for request in (passed, step):
                assert not (await w.answer(request)).category
            assert w.trained == [passed, "step"]

    scenario(body)


def test_a_bad_datum_fails_alone_and_its_seq_is_no_gate(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            bad = await w.forward_backward(run, text="bad")
            good = await w.forward_backward(run)
            answer = await w.answer(bad)
            assert (answer.category, answer.error) == ("user", "datum 0: bad")
            assert (await w.answer(good)).body == b"done"
            assert w.trained == [good]

    scenario(body)


@pytest.mark.parametrize("death", range(1, 18, 3))
def test_a_dead_worker_loses_nothing_and_repeats_nothing(tmp_path: Path, death: int) -> None:
    """F1: wherever the worker dies, each run is what it would have been."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            tasks = 0

            def dies(task: object) -> bool:
                nonlocal tasks
                tasks += 1
                return tasks == death

            w.engines.trainer.dies_on = dies
            passes = await w.train(run, 8)
            assert w.engines.trainer.starts == 2
            assert w.trained == stepped(passes)

    scenario(body)


def test_an_op_that_kills_the_worker_twice_fails_alone(tmp_path: Path) -> None:
    """F11: a poisonous op is failed after two tries; the lane and the other runs go on."""

    async def body() -> None:
        async with world(tmp_path) as w:
            poisoned, other = await w.connect(), await w.connect(BOB)
            w.engines.trainer.dies_on = lambda task: task.body.startswith(b"poison")
            before = await w.forward_backward(poisoned)
            poison = await w.forward_backward(poisoned, text="poison:8")
            after = await w.forward_backward(poisoned)
            bobs = await w.forward_backward(other, who=BOB)
            assert (await w.answer(bobs, BOB)).body == b"done"
            answer = await w.answer(poison)
            assert (answer.category, "twice" in answer.error) == ("server", True)
            assert (await w.answer(after)).body == b"done"
            assert w.engines.trainer.runs[poisoned] == [before, after]

    scenario(body)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_killed_server_goes_on_where_it_was(tmp_path: Path, steps: int) -> None:
    """F2, S1-48: what was acknowledged is kept, what was waiting is run, nothing is run twice."""

    async def body() -> None:
        path = tmp_path / "journal.sqlite"
        engines = ScriptedEngines()
        first = World(tmp_path, SqliteJournal(path), engines, SnapshotRule(3, 1e9))
        await first.service.start()
        run = await first.connect()
        passes = await first.train(run, steps)
        engines.trainer.hangs = True  # nothing is answered from here on
        waiting = await first.forward_backward(run)
        step = await first.optim_step(run)
        shown = state_view(first.service.state)
        for task in first.service._tasks:  # as kill -9: no orderly stop, no last snapshot
            task.cancel()
        await first.service.ledger.close()

        engines.trainer.hangs = False
        engines.trainer.kill()
        async with world(tmp_path, journal=SqliteJournal(path), engines=engines) as second:
            assert state_view(second.service.state)["runs"][0]["id"] == shown["runs"][0]["id"]
            assert (await second.answer(waiting)).body == b"done"
            assert not (await second.answer(step)).category
            assert (await second.answer(passes[0])).body == b"done"
            second.seq = first.seq
            more = await second.train(run, 2)
            assert second.trained == stepped([*passes, waiting, *more])
            state = second.service.state.runs[run]
            assert (state.step, state.pending) == (len(passes) + 3, 0)

    scenario(body)


def test_a_waiting_request_whose_body_rotted_on_disk_fails_alone(tmp_path: Path) -> None:
    """F5: the server starts, names the record, and runs what else waited."""
    path = tmp_path / "journal.sqlite"

    async def body() -> None:
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            run = await w.connect()
            w.engines.trainer.gate.clear()
            rotten, healthy = [await w.forward_backward(run, text=f"{name}:8") for name in ("one", "two")]
            record = w.service.state.accepted[rotten]
            await w.service.ledger.close()  # as after a kill -9
        with sqlite3.connect(path) as db:
            db.execute("UPDATE blobs SET blob = ? WHERE n = ?", (b"onf:8", record))
        db.close()
        async with world(tmp_path, journal=SqliteJournal(path)) as w:
            answer = await w.answer(rotten)
            assert (answer.category, f"body of record {record} " in answer.error) == ("server", True)
            assert (await w.answer(healthy)).body == b"done"
            assert w.trained == [healthy]

    scenario(body)


def test_snapshots_shorten_the_replay_and_old_ones_are_removed(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 10)
            state = w.service.state.runs[run]
            assert len(state.replay) <= 2 * 3
            assert len(list((tmp_path / "snapshots").glob("*/*"))) == 1

    scenario(body)


def test_a_model_that_cannot_be_loaded_fails_its_ops_with_the_reason(tmp_path: Path) -> None:
    async def body() -> None:
        engines = ScriptedEngines()
        engines.trainer.cannot_start = "no weights in somewhere/tiny"
        async with world(tmp_path, engines=engines) as w:
            session = await w.service.sessions.open(ALICE, {})
            made = await w.service.runs.create_model(ALICE, session, 0, "tiny", LORA, {}, b"")
            answer = await w.answer(made)
            assert answer.category == "user"
            assert "no weights in somewhere/tiny" in answer.error
            with pytest.raises(UserError, match="no weights"):
                await w.forward_backward(f"{session}:train:0")

    scenario(body)


def test_gpus_that_were_waited_for_in_vain_are_not_waited_for_again_by_themselves(tmp_path: Path) -> None:
    """S3-34: the error comes when the wait is over; the next request waits anew."""

    async def body() -> None:
        engines = ScriptedEngines()
        async with world(tmp_path, engines=engines) as w:
            run = await w.connect()
            engines.trainer.start_failure = Unobtainable("Timed out waiting for GPUs: 2/4 after 300s.")
            engines.trainer.fails_to_start = 1
            engines.trainer.kill()
            answer = await w.answer(await w.forward_backward(run))
            assert (answer.category, engines.trainer.starts) == ("server", 1)
            assert answer.error.endswith("2/4 after 300s.")
            assert not (await w.answer(await w.optim_step(run))).category

    scenario(body)


@pytest.mark.parametrize("failure", [ServerError("too busy"), EngineDied("gone"), ConnectionError("no Ray")])
def test_a_worker_that_cannot_start_yet_is_tried_again(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was too busy to start Ray loses nobody's accepted work; nor does a failure nobody thought of."""
    monkeypatch.setattr("tuft_jupyter.core.startup.PAUSES", (0.0, 0.0))

    async def body() -> None:
        engines = ScriptedEngines()
        engines.trainer.start_failure = failure
        engines.trainer.fails_to_start = 2
        async with world(tmp_path, engines=engines) as w:
            run = await w.connect()
            assert w.trained == []
            assert w.service.drivers["tiny"].status == "ready"
            engines.trainer.fails_to_start = 3
            engines.trainer.kill()
            answer = await w.answer(await w.forward_backward(run))
            assert (answer.category, "tried 3 times" in answer.error) == ("server", True)

    scenario(body)
