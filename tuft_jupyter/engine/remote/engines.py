"""The engines of one server, wherever they are: its own workers, or servers elsewhere, as :func:`route` says.

With nothing configured it hands on what it is given, and no connection is ever opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tuft_jupyter.config import Settings
from tuft_jupyter.config.backends import Backend
from tuft_jupyter.core.engine import Engines, SamplingEngine, TrainingEngine
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.remote import http, tinker_client, vllm_server
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.routing import route
from tuft_jupyter.engine.remote.tinker_sampling import TinkerSampling
from tuft_jupyter.engine.remote.tinker_training import TinkerTraining
from tuft_jupyter.engine.remote.vllm_server import VllmServer


class BackendEngines:
    """Implements ``core.engine.Engines``. ``workers`` makes our own engines."""

    def __init__(self, settings: Settings, workers: Engines) -> None:
        self._backends = backends = settings.backends
        self._workers = workers
        self._instance = hashlib.sha256(str(settings.home.absolute()).encode()).hexdigest()[:8]
        self._threads = ThreadPoolExecutor(backends.max_workers, "tuft-backend")
        self.servers: list[Server] = []
        self._samplers: dict[str, VllmServer] = {}
        if backends.trainer is Backend.TRAINING_SERVER:
            self._trainer = self._server(tinker_client.KIND, backends.training_url, backends.training_key)
        if backends.sampler is Backend.VLLM_SERVER:
            self._vllm = self._server(vllm_server.KIND, backends.vllm_url, backends.vllm_key)

    @property
    def needs_workers(self) -> bool:
        """Whether workers of ours train or sample."""
        return Backend.WORKERS in (self._backends.trainer, self._backends.sampler)

    def training(self, card: ModelCard) -> TrainingEngine:
        """UserError if nobody trains."""
        if route("forward_backward", self._backends) is Backend.TRAINING_SERVER:
            there = self._backends.sampler is Backend.TRAINING_SERVER
            trains = TinkerTraining(card, self._trainer, samples_there=there)
            trains.on_unload = lambda saved: self._release(card, saved)
            return trains
        return self._workers.training(card)

    def sampling(self, card: ModelCard) -> SamplingEngine:
        """UserError if nobody samples."""
        backend = route("asample", self._backends)
        if backend is Backend.VLLM_SERVER:
            samples = VllmServer(card, self._vllm, self._backends, self._instance)
            self._samplers[card.name] = samples
            return samples
        if backend is Backend.TRAINING_SERVER:
            return TinkerSampling(card, self._trainer)
        return self._workers.sampling(card)

    def _release(self, card: ModelCard, saved: Collection[Path]) -> None:
        """A run that was unloaded leaves both servers."""
        if card.name in self._samplers:
            self._samplers[card.name].release(saved)

    async def watch(self, there_again: Callable[[], None]) -> None:
        """Follow whether the servers elsewhere are there, for ever; ``there_again`` is called when one came back."""
        for server in self.servers:
            server.on_return = there_again
        await http.watch(self.servers)

    async def close(self) -> None:
        """End connections and threads, after the engines were stopped."""
        for server in self.servers:
            await server.close()
        self._threads.shutdown(wait=False)

    @property
    def description(self) -> str:
        """In words, who works here and elsewhere."""
        own = ["torch, peft and ray are installed"] if self.needs_workers else []
        return "; ".join(own + [f"{server.kind.name} at {server.url}" for server in self.servers])

    def _server(self, kind: http.Kind, url: str, key: str) -> Server:
        server = Server(kind, url, key, self._threads)
        self.servers.append(server)
        return server
