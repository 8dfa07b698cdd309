"""A training engine without numbers: it remembers which ops each run has gone through, and dies when told to.

What a run "is" here is the list of seqs of its passes and steps, saved to and loaded from a JSON file, so a test can
see exactly whether an op was lost or applied twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from tuft_jupyter.core.engine import (
    EngineDied,
    Outcome,
    Part,
    RunMemory,
    SamplingEngine,
    Task,
    TextTask,
    TrainingEngine,
)
from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import JSON, ModelCard, OpKind

Fault = Callable[[Task], bool]


class ScriptedEngine:
    """``dies_on`` is asked for each task before it is applied; True takes the whole worker down.

    ``calls`` are the batches asked for, ``steps`` those worked on; a closed ``gate`` keeps them apart.
    """

    part_tokens = 0

    def __init__(self) -> None:
        self.runs: dict[str, list[str]] = {}
        self.alive = False
        self.starts = 0
        self.steps: list[list[str]] = []
        self.dies_on: Fault = lambda task: False
        self.cannot_start = ""
        self.fails_to_start = 0
        self.start_failure: Exception = ServerError("too busy")
        self.hangs = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[list[str]] = []
        self._left: dict[str, int] = {}

    async def start(self) -> None:
        if self.cannot_start:
            raise UserError(self.cannot_start)
        if self.fails_to_start:
            self.fails_to_start -= 1
            raise self.start_failure
        self.starts += 1
        self.runs, self._left, self.alive = {}, {}, True

    async def stop(self) -> None:
        self.alive = False

    def kill(self) -> None:
        self.alive = False

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        self.calls.append([task.request_id for task in tasks])
        if self.hangs:
            await asyncio.Event().wait()
        await self.gate.wait()
        outcomes = []
        self.steps.append([task.request_id for task in tasks])
        for task in tasks:
            if self.dies_on(task):
                self.kill()
            if not self.alive:
                raise EngineDied("killed by the test")
            try:
                outcomes.append(self._apply(task))
            except OSError as error:  # as the real worker tells it
                outcomes.append(Outcome(task.request_id, category="server", error=f"{error}"))
        return outcomes

    def _apply(self, task: Task) -> Outcome:
        facts: dict[str, object] = {"engine_ms": 1.0}
        if task.kind is OpKind.CREATE_MODEL:
            self.runs[task.run] = []
        elif task.kind is OpKind.LOAD_WEIGHTS:
            saved = Path(task.args["directory"]) / "run.json"
            if not saved.exists():
                return Outcome(task.request_id, category="user", error=f"{saved} is missing")
            self.runs[task.run] = json.loads(saved.read_text())
        elif task.kind is OpKind.UNLOAD_MODEL:
            self.runs.pop(task.run, None)
        elif task.kind in (OpKind.SAVE_WEIGHTS, OpKind.SAVE_WEIGHTS_FOR_SAMPLER):
            directory = Path(task.args["directory"])
            directory.mkdir(parents=True)
            (directory / "run.json").write_text(json.dumps(self.runs[task.run]))
            facts["size_bytes"] = 1
        elif task.kind is OpKind.OPTIM_STEP:
            self.runs[task.run].append("step")
            facts |= {"grad_norm": 1.0, "learning_rate": 1e-3}
        else:
            return self._pass(task, facts)
        return Outcome(task.request_id, result=b"{}", content_type=JSON, facts=facts)

    def _pass(self, task: Task, facts: dict[str, object]) -> Outcome:
        if task.request_id not in self._left:
            text = task.body.decode()
            if text == "bad":
                return Outcome(task.request_id, category="user", error="datum 0: bad")
            self._left[task.request_id] = int(text.split(":")[1])
        left = self._left[task.request_id] - task.grant
        if left > 0:
            self._left[task.request_id] = left
            return Outcome(task.request_id, finished=False)
        del self._left[task.request_id]
        if task.kind is OpKind.FORWARD_BACKWARD:
            self.runs[task.run].append(task.request_id)
        facts |= {"loss_sum": 2.0, "weight_sum": 1.0, "tokens": 1}
        return Outcome(task.request_id, result=b"done", content_type=JSON, facts=facts)


class ScriptedSampler:
    """Answers every sample with the adapter's directory; a closed ``gate`` keeps it waiting."""

    def __init__(self) -> None:
        self.dies = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled: list[str] = []
        self.closed = 0
        self.held_up = ""
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        if self.dies:
            self.dies -= 1
            raise EngineDied("killed by the test")
        await self.gate.wait()
        facts = {"prompt_tokens": 3, "tokens": 4}
        return Outcome(request_id, result=(adapter or "base").encode(), content_type=JSON, facts=facts)

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """Two chunks for a stream, else one; for the user ``hang`` it draws until nobody listens."""
        if self.dies:
            self.dies -= 1
            raise EngineDied("killed by the test")
        asked = json.loads(task.body)
        chunk = json.dumps({"adapter": task.adapter, "chat": task.chat}).encode()
        try:
            if asked.get("stream"):
                yield Part([chunk])
            if asked.get("user") == "hang":
                await asyncio.Event().wait()
            yield Part([chunk], ended=True, facts={"prompt_tokens": 5, "tokens": 2})
        finally:
            self.closed += 1

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def waits_for(self, request_id: str) -> str:
        return self.held_up

    async def stop(self) -> None: ...


class ScriptedEngines:
    """Implements ``core.engine.Engines``: ``trainer`` is that of the first model asked for, others have their own."""

    def __init__(self) -> None:
        self.trainer = ScriptedEngine()
        self.sampler = ScriptedSampler()
        self._trainers: dict[str, ScriptedEngine] = {}

    def training(self, card: ModelCard) -> TrainingEngine:
        first = self.trainer if not self._trainers else ScriptedEngine()
        return self._trainers.setdefault(card.name, first)

    def sampling(self, card: ModelCard) -> SamplingEngine:
        return self.sampler

    def placements(self) -> list[dict[str, Any]]:
        return []

    async def ray(self) -> dict[str, Any]:
        return {"address": None, "why": None, "nodes": [], "placements": []}

    def workers(self) -> list[tuple[str, int]]:
        return []

    async def memory(self) -> dict[str, RunMemory]:
        return {}


class OneModel:
    """A catalog with one base model."""

    card = ModelCard("tiny", "somewhere/tiny", 128, 64, "Qwen3ForCausalLM")

    def cards(self) -> list[ModelCard]:
        return [self.card]

    def resolve(self, name: str) -> ModelCard:
        if name != self.card.name:
            raise UserError(f"Base model {name!r} is not supported. Supported models: tiny")
        return self.card

    find = resolve
