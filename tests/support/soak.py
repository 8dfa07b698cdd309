"""A server's months in minutes, with an instant engine: what stays in memory and on disk: ``make soak``.

The whole server but for Tornado and Ray, in this process: 500 times four clients come. One trains a run, saves it and
unloads it; all sample; every second one goes without a word. In between the server's clock is put forward by hours, so
that what is kept for a while only is seen to go.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.fake_engine import FakeEngines
from tests.support.load import passed
from tuft_jupyter.config import load_settings
from tuft_jupyter.core.image import plain
from tuft_jupyter.core.ledger import SLACK
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire.api import Call
from tuft_jupyter.wire.routes import ROUTES
from tuft_jupyter_server.host import Host

OPS, RUNS, VISITORS = 200_000, 500, 4
"""Training requests altogether; runs; sessions for each run (2,000 altogether)."""
HOURS = 12.0
"""Between two rounds, by the server's clock: the whole is 250 days."""
WARM = 0.3
"""The part of the rounds after which what is kept for thirty days has been kept for thirty days."""
IN_FLIGHT = 50
SLOPE_MB = 1.0
"""For each 10,000 training requests."""

ROUTE_OF = {route.endpoint: route for route in ROUTES}


@dataclass(slots=True)
class Soaked:
    """``ops``, ``objects`` (sessions, runs and samplers on record) and ``rss_mb`` at the end of each round.

    ``warm`` and ``end`` are descriptors, threads and tasks after the warm-up and at the end.

    ``live`` in bytes is the state as JSON; ``grown`` and ``file`` what the journal's file holds, before and after it is
    compacted (which it is by itself once what came since is more than that, and more than :data:`SLACK`).
    """

    ops: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    warm: tuple[int, int, int] = (0, 0, 0)
    end: tuple[int, int, int] = (0, 0, 0)
    live: int = 0
    grown: int = 0
    file: int = 0
    seconds: float = 0.0

    @property
    def slope(self) -> float:
        """Megabytes for each 10,000 requests after the warm-up, by least squares."""
        start = int(WARM * len(self.ops))
        ops, rss = self.ops[start:], self.rss_mb[start:]
        x, y = sum(ops) / len(ops), sum(rss) / len(rss)
        above = sum((a - x) * (b - y) for a, b in zip(ops, rss, strict=True))
        return 1e4 * above / sum((a - x) ** 2 for a in ops)


class Soak:
    def __init__(self, home: Path, hours: float) -> None:
        self.hours = hours
        self.journal = home / "journal.sqlite"
        kept = {"mode": "file_redis", "file_path": str(self.journal)}
        self.engines = FakeEngines()
        settings = load_settings(
            None, {"TUFT_HOME": str(home), "TUFT_MODEL_PATH": "tuft/demo"}, {"persistence": kept}
        )
        self.host = Host(settings, engines=self.engines)
        self.later = 0.0
        steady = self.host.ledger.clock
        self.host.ledger.clock = lambda: steady() + self.later

    async def told(self, verb: str, body: Any, media: str = JSON, **path: str) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.host.api.answer(ROUTE_OF[verb], Call(self.host.owner, path, {}, raw, media))
        assert answer.status == 200, (verb, answer.body[:300])
        return json.loads(answer.body)

    async def settled(self, promise: dict[str, str]) -> None:
        body = json.dumps({"request_id": promise["request_id"]}).encode()
        answer = await self.host.api.answer(ROUTE_OF["retrieve_future"], Call(self.host.owner, body=body))
        assert answer.status == 200, answer.body[:300]
        assert b'"error"' not in answer.body, answer.body[:300]

    async def train(self, session: str, ops: int) -> None:
        """A whole run of so many training requests."""
        run, seq = f"{session}:train:0", 0
        made = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        await self.settled(await self.told("create_model", made))
        left = ops - 4  # made, saved, saved for a sampler, unloaded
        while left > 0:
            asked = []
            for _ in range(min(left, IN_FLIGHT) // 2):
                seq += 2
                body = passed(run, seq - 1, 1, 8)
                asked.append(await self.told("forward_backward", body, PROTOBUF))
                step = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 2.0**-10}}
                asked.append(await self.told("optim_step", step))
            for promise in asked:
                await self.settled(promise)
            left -= IN_FLIGHT
        saved = {"model_id": run, "seq_id": seq + 1, "path": "last", "ttl_seconds": 86400}
        sampled = {"model_id": run, "seq_id": seq + 2, "sampling_session_seq_id": 0}
        for verb, body in (("save_weights", saved), ("save_weights_for_sampler", sampled)):
            await self.settled(await self.told(verb, body))
        await self.sample(f"{session}:sample:0")
        await self.settled(await self.told("unload_model", {"model_id": run}))

    async def sample(self, sampler: str) -> None:
        asked = {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [7, 8, 9]}]},
            "sampling_params": {"max_tokens": 2},
        }
        await self.settled(await self.told("asample", asked))

    async def visit(self, number: int, ops: int) -> None:
        session = (await self.told("create_session", {"tags": ["soak"]}))["session_id"]
        if number == 0:
            await self.train(session, ops)
        else:
            opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
            await self.told("create_sampling_session", opened)
            await self.sample(f"{session}:sample:0")
        if number % 2 == 0:
            await self.told("finish_session", {"reason": {"type": "success"}}, session=session)

    async def round(self, ops: int) -> None:
        for number in range(VISITORS):
            await self.visit(number, ops)
        self.later += self.hours * 3600
        await self.host.service.sweep(self.host.ledger.clock())
        self.engines.trainer.steps.clear()  # what the fake remembers for tests
        self.engines.trainer.trainer.calls.clear()

    def held(self) -> tuple[int, int, int]:
        """Descriptors, threads and tasks."""
        process = psutil.Process()
        return process.num_fds(), threading.active_count(), len(asyncio.all_tasks())

    def objects(self) -> int:
        state = self.host.ledger.state
        return len(state.sessions) + len(state.runs) + len(state.samplers)

    def live(self) -> int:
        """Bytes of what is alive: the state, and answers that wait for their clients."""
        ledger = self.host.ledger
        promises = [[p.request_id, p.tenant, p.owner] for p in ledger.promises.kept(ledger.state.accepted)]
        return len(json.dumps([plain(ledger.state), ledger.seen.image(set(ledger.state.runs)), promises]))


async def soak(home: Path, rounds: int, ops: int, hours: float = HOURS) -> Soaked:
    """``rounds`` times four visits with ``ops`` training requests, and so many ``hours`` between them."""
    found, began = Soaked(), time.perf_counter()
    world = Soak(home, hours)
    await world.host.start()
    try:
        for number in range(1, rounds + 1):
            await world.round(ops)
            gc.collect()
            found.ops.append(number * ops)
            found.objects.append(world.objects())
            found.rss_mb.append(psutil.Process().memory_info().rss / 1e6)
            if number == int(WARM * rounds):
                found.warm = world.held()
        found.end = world.held()
        found.live, found.grown = world.live(), _kept_in(world.journal)
        await world.host.ledger.compact()
        found.file = _kept_in(world.journal)
    finally:
        await world.host.stop()
    found.seconds = time.perf_counter() - began
    return found


def _kept_in(path: Path) -> int:
    """Bytes of the records, the image and the bodies in a journal's file."""
    db = sqlite3.connect(path)
    tables = (("data", "records"), ("data", "image"), ("blob", "blobs"))
    found = [
        db.execute(f"SELECT sum(length({column})) FROM {table}").fetchone()[0] for column, table in tables
    ]
    db.close()
    return sum(each or 0 for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=RUNS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tuft-soak-") as scratch:
        found = asyncio.run(soak(Path(scratch), asked.rounds, OPS // RUNS))
    for at in range(0, len(found.ops), max(1, len(found.ops) // 10)):
        print(f"{found.ops[at]:>8} requests {found.rss_mb[at]:7.1f} MB")
    print(
        f"slope {found.slope:.3f} MB for each 10,000 requests; descriptors, threads, tasks {found.warm} -> {found.end}"
    )
    print(
        f"journal {found.grown} bytes, compacted {found.file}: {found.file / found.live:.2f} x what is alive"
    )
    print(f"{found.seconds:.0f} s")
    sys.exit(not (found.slope < SLOPE_MB and found.warm == found.end and small(found)))


def small(found: Soaked) -> bool:
    """Whether the journal holds little more than what is alive."""
    return found.file < 2 * found.live and found.grown < 2 * found.live + 2 * SLACK


if __name__ == "__main__":
    main()
