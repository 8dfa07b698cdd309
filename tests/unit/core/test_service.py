"""The service with a scripted engine: order, once-only, recovery, isolation, and what a refusal leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.scripted_engine import OneModel, ScriptedEngines
from tuft_jupyter.core.driver import SnapshotRule
from tuft_jupyter.core.errors import NotFound, UserError
from tuft_jupyter.core.journal import Journal, MemoryJournal, SqliteJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.shown import public
from tuft_jupyter.core.types import AdamParams, CheckpointKind, Principal

ALICE, BOB = Principal("alice"), Principal("bob")
LORA = {"rank": 8, "seed": 1}


class World:
    """A service with one scripted engine, and shorthand for what a client does."""

    def __init__(self, home: Path, journal: Journal, engines: ScriptedEngines, rule: SnapshotRule) -> None:
        self.engines = engines
        self.service = Service(Ledger(journal), OneModel(), engines, home, home / "checkpoints", rule=rule)
        self.seq = 0

    @property
    def trained(self) -> list[str]:
        (run,) = self.engines.trainer.runs.values()
        return run

    async def connect(self, who: Principal = ALICE, number: int = 0) -> str:
        session = await self.service.sessions.open(who, {"tags": []})
        made = await self.service.runs.create_model(who, session, number, "tiny", LORA, {}, b"create")
        await self.answer(made, who)
        return f"{session}:train:{number}"

    async def forward_backward(
        self, run: str, tokens: int = 8, who: Principal = ALICE, text: str = ""
    ) -> str:
        self.seq += 1
        body = (text or f"b{self.seq}:{tokens}").encode()
        runs = self.service.runs
        return await runs.forward_backward(who, run, self.seq, tokens, body, "x", backward=True)

    async def optim_step(self, run: str, who: Principal = ALICE) -> str:
        self.seq += 1
        return await self.service.runs.optim_step(who, run, self.seq, AdamParams(), f"o{self.seq}".encode())

    async def answer(self, request_id: str, who: Principal = ALICE) -> Answer:
        answer = await self.service.retrieve(who, request_id, 5.0)
        assert answer is not None, "no answer within five seconds"
        return answer

    async def train(self, run: str, steps: int) -> list[str]:
        """Pipeline passes and steps; returns the request ids of the passes."""
        passes, waits = [], []
        for _ in range(steps):
            passes.append(await self.forward_backward(run))
            waits += [passes[-1], await self.optim_step(run)]
        for request_id in waits:
            assert not (await self.answer(request_id)).category
        return passes


@contextlib.asynccontextmanager
async def world(
    home: Path,
    *,
    journal: Journal | None = None,
    engines: ScriptedEngines | None = None,
    rule: SnapshotRule | None = None,
) -> AsyncIterator[World]:
    made = World(home, journal or MemoryJournal(), engines or ScriptedEngines(), rule or SnapshotRule(3, 1e9))
    await made.service.start()
    try:
        yield made
    finally:
        await made.service.stop()


def scenario(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something that happens in it has happened."""
    while not condition():  # noqa: ASYNC110 - the condition is a plain dict, nothing could be awaited
        await asyncio.sleep(0)


def stepped(passes: list[str]) -> list[str]:
    return [name for each in passes for name in (each, "step")]


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
            before = await w.forward_backward(poisoned)
            poison = await w.forward_backward(poisoned, text="poison:8")
            after = await w.forward_backward(poisoned)
            w.engines.trainer.dies_on = lambda task: task.request_id == poison
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
        shown = public(first.service.state)
        for task in first.service._tasks:  # as kill -9: no orderly stop, no last snapshot
            task.cancel()
        await first.service.ledger.close()

        engines.trainer.hangs = False
        engines.trainer.kill()
        async with world(tmp_path, journal=SqliteJournal(path), engines=engines) as second:
            assert public(second.service.state)["runs"][0]["id"] == shown["runs"][0]["id"]
            assert (await second.answer(waiting)).body == b"done"
            assert not (await second.answer(step)).category
            assert (await second.answer(passes[0])).body == b"done"
            second.seq = first.seq
            more = await second.train(run, 2)
            assert second.trained == stepped([*passes, waiting, *more])
            state = second.service.state.runs[run]
            assert (state.step, state.pending) == (len(passes) + 3, 0)

    scenario(body)


def test_snapshots_shorten_the_replay_and_old_ones_are_removed(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            await w.train(run, 10)
            state = w.service.state.runs[run]
            assert len(state.replay) <= 2 * 3
            assert len(list((tmp_path / "snapshots").iterdir())) == 1

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


def test_a_worker_that_cannot_start_yet_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that was too busy to start Ray loses nobody's accepted work."""
    monkeypatch.setattr("tuft_jupyter.core.startup.PAUSES", (0.0, 0.0))

    async def body() -> None:
        engines = ScriptedEngines()
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
            before = public(service.state)
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
            after = public(service.state, "alice")
            assert {**after, "n": 0} == {**before, "n": 0}

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
