"""Adapters for sampling: loaded from checkpoint directories once, kept while they are of use.

The key is the directory and what lies in it now, so a checkpoint saved again under the same name is read
again. At most ``capacity`` adapters are in the model; the one used least recently goes first, never one that is in
use. From a GPU it goes to host memory, and from there, when that is full, it is forgotten: its directory still has
it. Knows nothing of requests: whoever takes an adapter gives it back.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import checkpoint, memory
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.lora import Adapter, AdapterBank, NoRoom
from tuft_jupyter.engine.lru import LruCache, version_key


class AdapterCache:
    """Not for several threads: adapters go into the model that decodes.

    ``host_bytes`` of evicted adapters stay in host memory; None: a share of it on a GPU, none on a CPU.
    """

    def __init__(self, base: BaseModel, capacity: int, host_bytes: int | None = None) -> None:
        self._base = base
        self._bank = AdapterBank(base)
        self._held: LruCache[str] = LruCache(capacity, self._evict)
        self._room = memory.for_adapters(base.device)[1] if host_bytes is None else host_bytes
        self._host: OrderedDict[str, tuple[LoraConfig, Tensor]] = (
            OrderedDict()
        )  # least recently evicted first

    def take(self, directory: Path) -> str | None:
        """The name that the adapter of a directory has in the model, loaded if need be.

        None while there is no room. UserError if it is missing, damaged, or does not fit the base model.
        """
        name = version_key(directory, checkpoint.WEIGHTS)
        if self._held.take(name) is None:
            if not self._held.make_room():
                return None
            if name in self._host:
                self._bring_back(name)
            else:
                self._read(name, directory)
            self._held.put(name, name)
        return name

    def _read(self, name: str, directory: Path) -> None:
        saved = checkpoint.read(directory, self._base, optimizer=False)
        adapter = self._added(name, saved.config)
        try:
            saved.check_fits(adapter)
        except UserError:
            self._bank.remove(name)
            raise
        self._bank.load_state_dict(name, saved.weights)
        adapter.drop_masters()

    def _bring_back(self, name: str) -> None:
        config, weights = self._host.pop(name)
        self._room += weights.nbytes
        adapter = self._added(name, config)
        adapter.compute.copy_(weights)
        adapter.drop_masters()

    def _added(self, name: str, config: LoraConfig) -> Adapter:
        """In the model; where memory is short, others leave it first."""
        while True:
            try:
                return self._bank.add(name, config, trainable=False)
            except NoRoom:
                if not self._held.drop_one():
                    raise

    def _evict(self, name: str) -> None:
        adapter = self._bank[name]
        if self._room > 0 or self._host:
            weights = adapter.compute.to("cpu", copy=True)
            self._host[name] = adapter.config, weights
            self._room -= weights.nbytes
            while self._room < 0:
                _, (_, oldest) = self._host.popitem(last=False)
                self._room += oldest.nbytes
        self._bank.remove(name)

    def give_back(self, name: str) -> None:
        """One use less; the adapter stays until room is needed."""
        self._held.give_back(name)
