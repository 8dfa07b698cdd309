"""Saved adapters under the names that a vLLM engine knows them by.

vLLM's prefix cache tells adapters apart by name, so a name that is used again serves blocks of the weights that
had it before (vllm#42125): every saved version gets a name and an id of its own, for ever. An adapter is read and
verified here first, because vLLM takes what it is given, and a bad file found in the middle of a batch ends its
engine. At most ``capacity`` are held; whoever comes when all are in use waits; one that was dropped is loaded again
when it is asked for.

Knows no vLLM: loading and unloading are two functions. For one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.engine.lru import LruCache, version_key

NO_ADAPTERS = (
    "vLLM may not be asked for adapters here (VLLM_ENABLE_LORA is false): sample from the base model, or set "
    "VLLM_ENABLE_LORA=true"
)
NO_EXPERTS = (
    "it has weights on experts, with which vLLM is not asked to sample (it has them for some models, on a GPU): set "
    "sampler_type: torch for this model"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Named:
    """One saved version of an adapter. ``number`` is above 0 and, like ``name``, never used for another."""

    name: str
    number: int
    directory: Path


@dataclass(frozen=True, slots=True)
class _Held:
    named: Named
    loaded: asyncio.Task[None]


class NamedAdapters:
    """``load`` makes an adapter known to the engine, or raises; ``unload`` is told what leaves it."""

    def __init__(
        self,
        capacity: int,
        load: Callable[[Named], Awaitable[None]],
        unload: Callable[[Named], None],
        numbers: Iterator[int] | None = None,
    ) -> None:
        self._load = load
        self._numbers = numbers or itertools.count(1)
        self._cache: LruCache[_Held] = LruCache(capacity, lambda held: unload(held.named))
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def using(self, directory: Path) -> AsyncIterator[Named]:
        """The adapter of a directory, loaded, and kept for as long as the block lasts.

        UserError if it is missing, damaged, or does not fit.
        """
        key = version_key(directory, WEIGHTS)
        held = await self._take(key, directory)
        try:
            await asyncio.shield(held.loaded)  # others may wait for it too
            yield held.named
        finally:
            broken = held.loaded.done() and held.loaded.exception() is not None
            if not self._cache.give_back(key) and broken:
                self._cache.forget(key)
            self._freed.set()

    def held(self) -> list[Named]:
        """What the engine knows now."""
        return [held.named for held in self._cache.items()]

    def release(self, directories: Collection[Path]) -> None:
        """Let go of what is not in use of these; it is loaded again if it is asked for after all."""
        for key, held in self._cache.idle():
            if held.named.directory in directories:
                self._cache.forget(key)

    async def _take(self, key: str, directory: Path) -> _Held:
        while True:
            held = self._cache.take(key)
            if held is not None:
                return held
            if self._cache.make_room():
                number = next(self._numbers)
                named = Named(f"{directory.name}-{number}", number, directory)
                return self._cache.put(key, _Held(named, asyncio.create_task(self._loaded(key, named))))
            self._freed.clear()
            await self._freed.wait()

    async def _loaded(self, key: str, named: Named) -> None:
        if await asyncio.to_thread(_is_on_experts, named.directory):
            raise UserError(f"checkpoint: {NO_EXPERTS}")  # one that it does not expect ends an engine
        await self._load(named)
        if version_key(named.directory, WEIGHTS) != key:
            raise ServerError("the saved weights were replaced while they were read; sample again")


def _is_on_experts(directory: Path) -> bool:
    """A file that cannot be read is not: whoever loads it says why."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
        return bool(config.get("target_parameters"))
    except (OSError, ValueError, AttributeError):
        return False
