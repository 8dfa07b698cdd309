"""Tenants with thousands of things: what one asks for keeps the loop, and so everybody else, for a moment only."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.scripted_engine import ScriptedEngines
from tests.support.world import ALICE, World
from tuft_jupyter.core import state as fold
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.objects import Checkpoint, Run, Session, State
from tuft_jupyter.core.outlook import outlook
from tuft_jupyter.core.snapshots import SnapshotRule
from tuft_jupyter.wire.endpoints.base import Call
from tuft_jupyter.wire.endpoints.rest import RestEndpoints


def seconds(act: Callable[[], object]) -> float:
    """The shortest of five tries."""

    def tried() -> float:
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    return min(tried() for _ in range(5))


def add(state: State, runs: range) -> None:
    state.sessions["s"] = Session("s", "alice", 0.0)
    for i in runs:
        state.runs[f"r{i}"] = Run(f"r{i}", "s", "alice", "tiny", float(i), status="ready")
        for kind in ("weights", "sampler_weights"):
            path = f"tinker://r{i}/{kind}/n"
            state.checkpoints[path] = Checkpoint(path, f"r{i}", "alice", kind, "n", "tiny", float(i), "")


def test_what_a_kernel_asks_for_at_every_step_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Its curves are left out, and need not be copied first."""

    service = World(tmp_path, MemoryJournal(), ScriptedEngines(), SnapshotRule()).service
    add(service.state, range(3))
    before = seconds(lambda: outlook(service, "alice"))
    run = service.state.runs["r0"]
    for step in range(20_000):
        run.loss_sum = run.weight_sum = run.passes = 1
        fold._step(run, float(step), {})
    after = seconds(lambda: outlook(service, "alice"))
    (first, *_) = outlook(service, "alice")["runs"]
    assert (first["step"], "curve" in first) == (20_000, False)
    assert after < 5 * before + 1e-3


def test_a_list_of_runs_takes_as_long_as_it_is(tmp_path: Path) -> None:
    """Not as the product of runs and checkpoints; each has its own last ones."""

    rest = RestEndpoints()
    rest.service = World(tmp_path, MemoryJournal(), ScriptedEngines(), SnapshotRule()).service

    def listed() -> list[dict[str, dict[str, str]]]:
        answer = asyncio.run(rest.list_runs(Call(ALICE, query={"limit": "100000"})))
        found: list[dict[str, dict[str, str]]] = json.loads(answer.body)["training_runs"]
        return found

    add(rest.service.state, range(500))
    short = seconds(listed)
    add(rest.service.state, range(4000))
    assert seconds(listed) < 24 * short
    newest = listed()[0]
    assert newest["last_checkpoint"]["tinker_path"] == "tinker://r3999/weights/n"
    assert newest["last_sampler_checkpoint"]["tinker_path"] == "tinker://r3999/sampler_weights/n"
