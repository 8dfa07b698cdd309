"""Fake engines: arithmetic in place of a model, for faults that must come on cue and for thousands of fast cases.

:class:`FakeTrainer` and :class:`FakeSampler` stand where the torch classes stand, below the real workers, so bodies are
decoded, cut and encoded as in the product. :class:`FakeTrainingEngine` and :class:`FakeSamplingEngine` stand where the
Ray engines stand, in this process. Everything they compute is exact and depends only on what was asked.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuft_jupyter.core.engine import EngineDied, Listener, Outcome, RunMemory, Task
from tuft_jupyter.core.errors import NotFound, ServerError, TuftError, UserError
from tuft_jupyter.core.types import (
    AdamParams,
    Drawn,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    ModelCard,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
)
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.worker import TrainingWorker

VOCAB = 1000
CONTEXT = 64


class Killed(BaseException):
    """The fake's way of dying at once: nothing catches it but the engine around it."""


@dataclass
class Faults:
    """What is to go wrong, and when. Tokens trigger faults in passes and in prompts that contain them."""

    raise_on: int | None = None
    """token: an exception out of the blue"""
    refuse_on: int | None = None
    """token: a ServerError in that item's place"""
    kill_on: int | None = None
    """token: the worker dies in the middle of the pass"""
    hang_on: int | None = None
    """token: the pass waits for ``release``"""
    raise_in: str = ""
    """name of a method that raises: create, load, save, optim_step"""
    corpse: bool = False
    """every call raises, and the device is beyond use, until a new worker is started"""
    starts: list[Exception] = field(default_factory=list)
    """one failure per start, from the first"""
    die: Callable[[], Any] | None = None
    """how to die in earnest, in place of raising :class:`Killed`"""
    hanging: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def meet(self, tokens: np.ndarray) -> None:
        if self.corpse:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.kill_on is not None and self.kill_on in tokens:
            if self.die is not None:
                self.die()
            raise Killed
        if self.hang_on is not None and self.hang_on in tokens:
            self.hanging.set()
            self.release.wait()
        if self.raise_on is not None and self.raise_on in tokens:
            raise ZeroDivisionError("out of the blue")

    def meet_call(self, name: str) -> None:
        if self.corpse or self.raise_in == name:
            raise RuntimeError(f"{name} broke")


@dataclass
class FakeRun:
    """One number is the adapter, one its gradient, one counts steps."""

    lora: LoraSpec
    weight: float = 0.0
    grad: float = 0.0
    steps: int = 0


class FakeTrainer:
    """Implements ``core.engine.Trainer``. ``calls`` lists the trainer calls with the runs in each.

    The log-probability of a token t is ``-(1 + weight) * (t + 1) / 64``, its gradient the weighted sum of
    ``(t + 1) / 64``; a step is SGD. All are exact in binary as long as weights are.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.runs: dict[str, FakeRun] = {}
        self.calls: list[tuple[str, list[str]]] = []

    def create(self, run: str, lora: LoraSpec) -> None:
        self._called("create", [run])
        if run in self.runs:
            raise ValueError(f"{run} exists")
        if lora.rank > 64:
            raise UserError(f"lora_config: rank must be from 1 to 64, not {lora.rank}")
        self.runs[run] = FakeRun(lora)

    def load(self, run: str, source: Path, *, optimizer: bool) -> LoraSpec:
        self._called("load", [run])
        try:
            saved = json.loads((source / "fake.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{source} holds no adapter") from None
        lora = LoraSpec(**saved["lora"])
        self.runs[run] = FakeRun(lora, saved["weight"], steps=saved["steps"] if optimizer else 0)
        return lora

    def check(self, request: ForwardBackward) -> None:
        for i, datum in enumerate(request.data):
            if (datum.tokens >= VOCAB).any():
                raise UserError(f"data[{i}]: a token is outside the vocabulary of {VOCAB}")

    def forward_backward(
        self, batch: Sequence[tuple[str, ForwardBackward]]
    ) -> list[ForwardBackwardResult | TuftError]:
        self._called("forward_backward", [run for run, _ in batch])
        return [self._pass(run, request) for run, request in batch]

    def optim_step(self, batch: Sequence[tuple[str, AdamParams]]) -> list[Mapping[str, float] | TuftError]:
        self._called("optim_step", [run for run, _ in batch])
        results: list[Mapping[str, float] | TuftError] = []
        for name, params in batch:
            run = self.runs.get(name)
            if run is None:
                results.append(NotFound(f"{name} is not in training here"))
                continue
            results.append({"grad_norm": abs(run.grad), "spread": float("nan")})
            run.weight -= params.learning_rate * run.grad
            run.grad = 0.0
            run.steps += 1
        return results

    def save(self, run: str, target: Path, *, optimizer: bool, durable: bool = True) -> int:
        self._called("save", [run])
        live = self.runs[run]
        lora = {name: getattr(live.lora, name) for name in live.lora.__slots__}
        target.mkdir(parents=True)
        text = json.dumps({"weight": live.weight, "steps": live.steps if optimizer else 0, "lora": lora})
        return (target / "fake.json").write_text(text)

    def remove(self, run: str) -> None:
        self.runs.pop(run, None)

    def memory(self) -> dict[str, RunMemory]:
        return {run: RunMemory(model=8) for run in self.runs}

    def alive(self) -> None:
        """Raises once the fake is a corpse."""
        if self.faults.corpse:
            raise RuntimeError("no device")

    def _pass(self, name: str, request: ForwardBackward) -> ForwardBackwardResult | TuftError:
        run = self.runs.get(name)
        if run is None:
            return NotFound(f"{name} is not in training here")
        logprobs, loss, weight_sum = [], 0.0, 0.0
        for datum in request.data:
            self.faults.meet(datum.tokens)
            if self.faults.refuse_on is not None and self.faults.refuse_on in datum.tokens:
                return ServerError("out of memory")
            targets = datum.inputs["target_tokens"]
            weights = datum.inputs.get("weights", np.ones(targets.shape, np.float32))
            scores = (targets.astype(np.float64) + 1) / 64
            logprobs.append((-(1 + run.weight) * scores).astype(np.float32))
            loss += float((1 + run.weight) * (scores * weights).sum())
            weight_sum += float(np.abs(weights).sum())
            if request.backward:
                run.grad += float((scores * weights).sum())
        longest = float(max(len(datum.tokens) for datum in request.data))
        return ForwardBackwardResult(logprobs, loss, weight_sum, {"longest:max": longest})

    def _called(self, name: str, runs: list[str]) -> None:
        self.faults.meet_call(name)
        self.calls.append((name, runs))


class FakeSampler:
    """Implements ``core.engine.Sampler``: sample i of a prompt repeats ``(last token + i) % VOCAB``.

    An adapter adds its weight (rounded) to the token. One token is drawn per step for every live request.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.live: dict[str, tuple[int, SampleRequest, int]] = {}
        self._on_token: dict[str, Listener | None] = {}
        self.held_up = ""
        self._lock = threading.Lock()

    def check(self, request: SampleRequest) -> None:
        if (request.prompt >= VOCAB).any():
            raise UserError(f"the prompt has a token outside the vocabulary of {VOCAB}")

    def submit(
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None = None
    ) -> None:
        shift = 0 if adapter is None else round(json.loads((adapter / "fake.json").read_text())["weight"])
        with self._lock:
            self.live[key] = (shift, request, 0)
            self._on_token[key] = on_token

    def step(self) -> list[tuple[str, SampleResult | TuftError]]:
        ended: list[tuple[str, SampleResult | TuftError]] = []
        with self._lock:
            batch = list(self.live.items())
        for key, (shift, request, drawn) in batch:
            self.faults.meet(request.prompt)
            self._tell(key, shift, request, drawn + 1 == _longest(request))
            if drawn + 1 < _longest(request):
                with self._lock:
                    if key in self.live:
                        self.live[key] = (shift, request, drawn + 1)
                continue
            with self._lock:
                if self.live.pop(key, None) is not None:
                    ended.append((key, _result(shift, request)))
        return ended

    def _tell(self, key: str, shift: int, request: SampleRequest, last: bool) -> None:
        on_token = self._on_token.get(key)
        for i in range(request.num_samples if on_token else 0):
            token = (int(request.prompt[-1]) + shift + i) % VOCAB
            on_token(Drawn(i, token, -0.5, (), StopReason.LENGTH if last else None))  # type: ignore[misc]

    def busy(self) -> bool:
        with self._lock:
            return bool(self.live)

    def cancel(self, key: str) -> None:
        with self._lock:
            self.live.pop(key, None)

    def waits_for(self, key: str) -> str:
        return self.held_up


def _longest(request: SampleRequest) -> int:
    asked = request.params.max_tokens
    return CONTEXT - len(request.prompt) if asked is None else asked


def _result(shift: int, request: SampleRequest) -> SampleResult:
    n, last = _longest(request), int(request.prompt[-1])
    sequences = [
        SampledSequence(
            np.full(n, (last + shift + i) % VOCAB, np.int32), np.full(n, -0.5, np.float32), StopReason.LENGTH
        )
        for i in range(request.num_samples)
    ]
    prompt_logprobs = None
    if request.prompt_logprobs:
        prompt_logprobs = np.full(len(request.prompt), -0.25, np.float32)
        prompt_logprobs[0] = np.nan
    return SampleResult(sequences, prompt_logprobs)


class FakeTrainingEngine:
    """Implements ``core.engine.TrainingEngine`` in this process; a worker is a thread, where steps run in order.

    ``starts`` counts workers brought up; :meth:`kill` is a ``kill -9`` of the worker.
    """

    part_tokens = 0

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.starts = 0
        self.steps: list[list[Task]] = []
        self.trainer = FakeTrainer(self.faults)
        self._worker: TrainingWorker | None = None
        self._thread = ThreadPoolExecutor(1)
        self._died: asyncio.Future[None] | None = None

    async def start(self) -> None:
        self.starts += 1
        if self.faults.starts:
            raise self.faults.starts.pop(0)
        self.faults.corpse = False
        self.trainer = FakeTrainer(self.faults)
        self._worker = TrainingWorker(self.trainer, self.trainer.alive)
        self._thread = ThreadPoolExecutor(1)
        self._died = asyncio.get_running_loop().create_future()

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        worker, died = self._worker, self._died
        if worker is None or died is None or died.done():
            raise EngineDied("the fake training worker is not running")
        self.steps.append(list(tasks))
        call = asyncio.get_running_loop().run_in_executor(self._thread, _step, worker, tasks)
        either: list[asyncio.Future[Any]] = [call, died]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            raise EngineDied("the fake training worker was killed")
        try:
            return call.result()
        except EngineDied:
            self.kill()
            raise

    async def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        """Everything the worker held is gone; a step in progress raises EngineDied."""
        self._worker = None
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._died is not None and not self._died.done():
            self._died.set_result(None)


def _step(worker: TrainingWorker, tasks: Sequence[Task]) -> list[Outcome]:
    try:
        return worker.step(tasks)
    except Killed:
        raise EngineDied("the fake training worker was killed in the middle of a step") from None


class FakeSamplingEngine:
    """Implements ``core.engine.SamplingEngine`` in this process."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.starts = 0
        self.sampler = FakeSampler(self.faults)
        self._worker: SamplingWorker | None = None

    async def start(self) -> None:
        self.starts += 1
        if self.faults.starts:
            raise self.faults.starts.pop(0)
        self.faults.corpse = False
        self.sampler = FakeSampler(self.faults)
        self._worker = SamplingWorker(self.sampler, on_death=self.kill)

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        if self._worker is None:
            raise EngineDied("the fake sampling worker is not running")
        return await self._worker.sample(request_id, adapter, body, salt=tenant)

    async def cancel(self, request_id: str) -> None:
        if self._worker is not None:
            self._worker.cancel(request_id)

    async def waits_for(self, request_id: str) -> str:
        return self.sampler.held_up

    async def stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def kill(self) -> None:
        self._worker = None


class FakeEngines:
    """The fake engines of one model for the service, with the same faults."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.trainer = FakeTrainingEngine(self.faults)
        self.sampler = FakeSamplingEngine(self.faults)

    def training(self, card: ModelCard) -> FakeTrainingEngine:
        return self.trainer

    def sampling(self, card: ModelCard) -> FakeSamplingEngine:
        return self.sampler

    def placements(self) -> list[dict[str, Any]]:
        return []

    async def ray(self) -> dict[str, Any]:
        return {"address": None, "why": None, "nodes": [], "placements": []}

    def workers(self) -> list[tuple[str, int]]:
        return []

    async def memory(self) -> dict[str, RunMemory]:
        return self.trainer.trainer.memory()
