"""The real trainer and sampler in this process, each in a thread of its own: actors without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tuft_jupyter.core.engine import EngineDied, Outcome, Part, RunMemory, Task, TextTask
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.text_worker import TextWorker
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.engine.trainer import PeftTrainer
from tuft_jupyter.engine.worker import TrainingWorker


class LocalTraining:
    """Implements ``core.engine.TrainingEngine``."""

    part_tokens = 0

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._thread = ThreadPoolExecutor(1, "trainer")
        self._worker: TrainingWorker | None = None

    async def start(self) -> None:
        self._worker = await asyncio.get_running_loop().run_in_executor(self._thread, self._make)

    def _make(self) -> TrainingWorker:
        card = self._card
        limits = {"max_rank": 16, "max_length": card.max_context_length, "custom_loss": True}
        return TrainingWorker(
            PeftTrainer(card.path, name=card.name, device="cpu", dtype=torch.float32, **limits)
        )

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        if self._worker is None:
            raise EngineDied("not started")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._worker.step, list(tasks))

    async def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class LocalSampling:
    """Implements ``core.engine.SamplingEngine``."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._worker: SamplingWorker | None = None
        self._text: TextWorker

    async def start(self) -> None:
        self._worker = await asyncio.to_thread(self._make)
        self._text = TextWorker(self._worker, Path(self._card.path))

    def _make(self) -> SamplingWorker:
        card = self._card
        sampler = TorchSampler(
            card.path,
            name=card.name,
            device="cpu",
            dtype=torch.float32,
            max_context=card.max_context_length,
        )
        return SamplingWorker(sampler)

    def _ready(self) -> SamplingWorker:
        if self._worker is None:
            raise EngineDied("not started")
        return self._worker

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        return await self._ready().sample(request_id, adapter, body)

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        self._ready()
        try:
            part = await self._text.begin(task)
            yield part
            while not part.ended:
                part = await self._text.more(task.request_id)
                yield part
        finally:
            self._text.cancel(task.request_id)

    async def cancel(self, request_id: str) -> None:
        self._ready().cancel(request_id)

    async def waits_for(self, request_id: str) -> str:
        return self._ready().waits_for(request_id)

    async def stop(self) -> None:
        if self._worker is not None:
            await asyncio.to_thread(self._worker.close)


class LocalEngines:
    """Implements ``core.engine.Engines``."""

    def training(self, card: ModelCard) -> LocalTraining:
        return LocalTraining(card)

    def sampling(self, card: ModelCard) -> LocalSampling:
        return LocalSampling(card)

    def placements(self) -> list[dict[str, Any]]:
        return []

    async def ray(self) -> dict[str, Any]:
        return {"address": None, "why": None, "nodes": [], "placements": []}

    def workers(self) -> list[tuple[str, int]]:
        return []

    async def memory(self) -> dict[str, RunMemory]:
        return {}
