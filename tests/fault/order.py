"""A network that repeats, delays, reorders and drops, while worker and server die: the service against the model."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.fault.bench import Fault, Trial
from tests.support.model import REFUSED, Model
from tests.support.world import ALICE, BOB, SnapshotRule, World, world
from tuft_jupyter.core.driver import MAX_SERVERS
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.journal import Journal, MemoryJournal
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import AdamParams, Principal

Sent = tuple[Principal, str, int, bytes]
"""Who sends what to which run, under which number."""


def traffic(rng: Random, runs: list[tuple[Principal, str]]) -> list[Sent]:
    """Requests as they arrive: numbers with holes, neighbours swapped, some again, some again with other bytes."""
    sent: list[Sent] = []
    for who, run in runs:
        seq, own = 0, []
        for _ in range(rng.randrange(1, 10)):
            seq += rng.choice([1, 1, 1, 2, 5])
            body = b"o%d" % seq if rng.random() < 0.4 else b"f%d:%d" % (seq, rng.randrange(1, 900))
            own.append((who, run, seq, body))
        for i in range(len(own) - 1):
            if rng.random() < 0.3:
                own[i], own[i + 1] = own[i + 1], own[i]
        sent += own
    rng.shuffle(runs)
    for again in rng.sample(sent, k=rng.randrange(len(sent))):
        late = rng.randrange(sent.index(again), len(sent)) + 1
        other = (*again[:3], again[3] + b"0") if rng.random() < 0.2 else again
        sent.insert(late, other)
    return sent


async def send(w: World, request: Sent) -> str:
    who, run, seq, body = request
    try:
        if body.startswith(b"o"):
            return await w.service.runs.optim_step(who, run, seq, AdamParams(), body)
        tokens = int(body.split(b":")[1])
        return await w.service.runs.forward_backward(who, run, seq, tokens, body, "x", backward=True)
    except UserError:
        return REFUSED


async def play(rng: Random, home: Path) -> None:
    """One sequence: traffic in bursts, with deaths between and during them."""
    kept = rng.random() < 0.3
    model = Model()
    runs: list[tuple[Principal, str]] = []
    arriving: list[Sent] = []
    ends = 0
    while arriving or not runs:
        journal: Journal = SqliteJournal(home / "journal.sqlite") if kept else MemoryJournal()
        async with world(home, journal=journal, rule=SnapshotRule(rng.randrange(1, 5), 1e9)) as w:
            if not runs:
                runs = [(who, await w.connect(who)) for who in (ALICE, BOB)]
                arriving = traffic(rng, list(runs))
            dies = rng.randrange(20)  # once: an op is given up when the worker died twice over it
            for burst in range(len(arriving)):
                if kept and arriving and ends < MAX_SERVERS and rng.random() < 0.1:
                    ends += 1  # not as often as an op is given up
                    await w.service.ledger.close()  # the server dies: nothing is written down at the end
                    break
                at = rng.randrange(1, 5)
                await deliver(w, arriving[:at], model)
                arriving = arriving[at:]
                if burst == dies:
                    w.engines.trainer.kill()
                if rng.random() < 0.1:
                    await w.service.ledger.tidy()
                    await w.service.ledger.compact()
            else:
                await compare(w, runs, model)


async def deliver(w: World, burst: list[Sent], model: Model) -> None:
    """Requests that arrive together: the service answers as the model does."""
    answers = await asyncio.gather(*(send(w, each) for each in burst))
    for (_, run, seq, body), answer in zip(burst, answers, strict=True):
        expected = model.expects(run, seq, body)
        if expected is None:
            model.accepted(run, seq, body, answer)
        else:
            assert answer == expected, (run, seq, body, answer, expected)


async def compare(w: World, runs: list[tuple[Principal, str]], model: Model) -> None:
    """When everything is answered, each run went through what the model says."""
    for who, run in runs:
        for (owner, _), (_, request_id) in model.seen.items():
            if owner == run:
                answer = await w.answer(request_id, who)
                assert not answer.category, answer
        expected = model.done.get(run, [])
        held = w.engines.trainer.runs.get(
            run, expected
        )  # a run that nobody used since a restart is not loaded
        assert held == expected, (held, expected)
        state = w.service.state.runs[run]
        assert (state.step, state.pending) == (expected.count("step"), 0)


@contextlib.contextmanager
def sequences(home: Path) -> Iterator[Trial]:
    def trial(rng: Random) -> str:
        place = home / "one"
        place.mkdir()
        try:
            asyncio.run(asyncio.wait_for(play(rng, place), 60))
        finally:
            shutil.rmtree(place)
        return ""

    yield trial


FAULTS = [
    Fault(
        "F13",
        "requests repeated, reordered, delayed, with holes; worker and server die meanwhile",
        "each is done once, in the order of first arrival",
        sequences,
        share=100,
    )
]
