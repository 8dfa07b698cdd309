"""The service over real workers and fake arithmetic: whatever dies, the numbers are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tinker import types as sdk

from tests.support.fake_engine import FakeEngines, Faults
from tests.support.loops import on_a_loop
from tests.support.scripted_engine import OneModel
from tests.support.sdk_bodies import sdk_body
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.snapshots import SnapshotRule
from tuft_jupyter.core.types import PROTOBUF, AdamParams, Principal

ALICE, BOB = Principal("alice"), Principal("bob")
TENANTS = (ALICE, BOB)
STEPS = 6
POISON = 999


class Client:
    """One tenant's run, and what its SDK would send."""

    def __init__(self, service: Service, who: Principal, run: str) -> None:
        self.service, self.who, self.run = service, who, run
        self._seq = 0

    @classmethod
    async def connect(cls, service: Service, who: Principal) -> Client:
        session = await service.sessions.open(who, {"tags": []})
        lora = {"rank": 8, "seed": 1}
        made = await service.runs.create_model(who, session, 0, "tiny", lora, {}, b"create")
        client = cls(service, who, f"{session}:train:0")
        assert not (await client.answer(made)).category
        return client

    async def forward_backward(self, *rows: list[int]) -> str:
        self._seq += 1
        data = [
            sdk.Datum(model_input=sdk.ModelInput.from_ints(row), loss_fn_inputs={"target_tokens": row})
            for row in rows
        ]
        return await self.service.runs.forward_backward(
            self.who, self.run, self._seq, sum(map(len, rows)), sdk_body(data), PROTOBUF, backward=True
        )

    async def optim_step(self) -> str:
        self._seq += 1
        adam = AdamParams(learning_rate=2.0**-10)
        return await self.service.runs.optim_step(self.who, self.run, self._seq, adam, b"o%d" % self._seq)

    async def answer(self, request_id: str) -> Answer:
        answer = await self.service.retrieve(self.who, request_id, 10.0)
        assert answer is not None, "no answer within ten seconds"
        return answer


@contextlib.asynccontextmanager
async def served(
    home: Path, engines: FakeEngines, rule: SnapshotRule | None = None
) -> AsyncIterator[Service]:
    rule = rule or SnapshotRule(steps=3, seconds=1e9)
    service = Service(Ledger(MemoryJournal()), OneModel(), engines, home, home / "checkpoints", rule=rule)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def train(client: Client) -> list[bytes | None]:
    """Pipelined passes, some larger than a batch, each with its step; the bytes of the answers."""
    pending = []
    for step in range(STEPS):
        rows = [[(step + row + i) % 50 for i in range(100)] for row in range(1 + 9 * (step % 2))]
        pending += [await client.forward_backward(*rows), await client.optim_step()]
    answers = [await client.answer(request_id) for request_id in pending]
    assert not [answer.error for answer in answers if answer.category]
    return [answer.body for answer in answers]


async def kill_after(engines: FakeEngines, steps: int) -> None:
    """A ``kill -9`` of the worker once so many steps were sent to it."""
    while len(engines.trainer.steps) < steps:  # noqa: ASYNC110 - a plain list, nothing to await
        await asyncio.sleep(0)
    engines.trainer.kill()


async def results(
    home: Path, kill: int | None
) -> tuple[list[list[bytes | None]], list[tuple[float, int]], int]:
    """(answers, final weights and step counts, starts) of two tenants training at once."""
    engines = FakeEngines()
    async with served(home, engines) as service:
        clients = [await Client.connect(service, who) for who in TENANTS]
        killer = asyncio.create_task(kill_after(engines, kill)) if kill is not None else None
        answers = await asyncio.gather(*(train(client) for client in clients))
        if killer is not None:
            await killer
        for client in clients:  # an op more, so that a run that was lost at the very end is back
            await client.answer(await client.forward_backward([1]))
        runs = [engines.trainer.trainer.runs[client.run] for client in clients]
        return answers, [(run.weight, run.steps) for run in runs], engines.trainer.starts


@pytest.mark.slow
@on_a_loop
async def test_a_worker_killed_at_any_point_gives_the_numbers_of_an_undisturbed_run(tmp_path: Path) -> None:
    """F1, F15 on fakes: no op is lost, none is doubled, every answer has the same bytes."""
    *undisturbed, starts = await results(tmp_path / "undisturbed", None)
    assert starts == 1
    for kill in range(3, 30):
        *disturbed, starts = await results(tmp_path / str(kill), kill)
        assert disturbed == undisturbed, f"killed after step {kill}"
        assert starts == 2


@pytest.mark.parametrize("fault", ["raise_on", "refuse_on"])
def test_an_op_that_fails_leaves_the_numbers_of_its_run_and_of_others_alone(
    fault: str, tmp_path: Path
) -> None:
    """A failure between two slices is undone by rebuilding the run; nobody else notices."""

    async def scenario() -> None:
        engines = FakeEngines(Faults(**{fault: POISON}))
        async with served(tmp_path, engines) as service:
            alice, bob = [await Client.connect(service, who) for who in TENANTS]
            long = [[i % 50] * 100 for i in range(12)]
            sent = [await alice.forward_backward([1, 2]), await bob.forward_backward(*long)]
            bad = await alice.forward_backward(*long, [POISON])
            sent += [await alice.optim_step(), await bob.optim_step()]
            failed = await alice.answer(bad)
            assert failed.category == "server"
            assert not [a.error for a in [await alice.answer(r) for r in (sent[0], sent[2])] if a.category]
            assert not [a.error for a in [await bob.answer(r) for r in (sent[1], sent[3])] if a.category]
            runs = engines.trainer.trainer.runs
            assert runs[alice.run].weight == -(2 + 3) / 64 * 2.0**-10
            assert runs[bob.run].weight == -sum((i % 50 + 1) * 100 for i in range(12)) / 64 * 2.0**-10
            assert engines.trainer.starts == 1

    asyncio.run(scenario())


@on_a_loop
async def test_a_pass_that_fails_in_its_last_part_holds_up_nothing_behind_it(tmp_path: Path) -> None:
    """P4: the pass behind it was begun in the same batch, and the run is rebuilt with that one unfinished."""
    engines = FakeEngines(Faults(refuse_on=POISON))
    async with served(tmp_path, engines) as service:
        alice, bob = [await Client.connect(service, who) for who in TENANTS]
        for request_id in (await alice.forward_backward([1]), await alice.optim_step()):
            await alice.answer(request_id)
        bad = alice.forward_backward(*[[1] * 100] * 6, [POISON])
        behind = alice.forward_backward(*[[2] * 100] * 6)
        failed, begun = await asyncio.gather(bad, behind)
        last = await alice.optim_step()
        assert (await alice.answer(failed)).category == "server"
        assert not [a.error for a in [await alice.answer(r) for r in (begun, last)] if a.category]
        assert not (await bob.answer(await bob.forward_backward([1]))).category
        assert engines.trainer.trainer.runs[alice.run].weight == -(2 + 3 * 600) / 64 * 2.0**-10


@on_a_loop
async def test_an_op_that_kills_its_worker_fails_after_two_tries_and_alone(tmp_path: Path) -> None:
    """F11: the others, and the poisonous run itself, go on from where they were."""
    engines = FakeEngines(Faults(kill_on=POISON))
    async with served(tmp_path, engines) as service:
        alice, bob = [await Client.connect(service, who) for who in TENANTS]
        first = await alice.forward_backward([1])
        bad = await alice.forward_backward([POISON])
        other = await bob.forward_backward([2])
        last = [await alice.optim_step(), await bob.optim_step()]
        assert (await alice.answer(bad)).category == "server"
        for client, request_id in ((alice, first), (bob, other), (alice, last[0]), (bob, last[1])):
            assert not (await client.answer(request_id)).category
        runs = engines.trainer.trainer.runs
        assert (runs[alice.run].weight, runs[bob.run].weight) == (-(2.0**-15), -3 * 2.0**-16)
        assert engines.trainer.starts <= 3


@on_a_loop
async def test_a_corpse_is_replaced_and_the_client_hears_nothing_of_it(tmp_path: Path) -> None:
    """F9: at most one failed call, then a new worker."""
    faults = Faults()
    engines = FakeEngines(faults)
    async with served(tmp_path, engines) as service:
        alice = await Client.connect(service, ALICE)
        await alice.answer(await alice.forward_backward([1]))
        faults.corpse = True
        last = [await alice.forward_backward([1]), await alice.optim_step()]
        assert not [answer.error for answer in [await alice.answer(r) for r in last] if answer.category]
        assert engines.trainer.trainer.runs[alice.run].weight == -4 / 64 * 2.0**-10
        assert engines.trainer.starts == 2
