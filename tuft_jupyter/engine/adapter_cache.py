"""Adapters for sampling: loaded from checkpoint directories once, kept while they are of use.

The key is the directory and what lies in it now, so a checkpoint saved again under the same name is read
again. At most ``capacity`` adapters are held; the one used least recently goes first, never one that is in
use. Knows nothing of requests: whoever takes an adapter gives it back.
"""

from __future__ import annotations

from pathlib import Path

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import checkpoint
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.lora import AdapterBank
from tuft_jupyter.engine.lru import LruCache, version_key


class AdapterCache:
    """Not for several threads: adapters go into the model that decodes."""

    def __init__(self, base: BaseModel, capacity: int) -> None:
        self._base = base
        self._bank = AdapterBank(base)
        self._held: LruCache[str] = LruCache(capacity, self._bank.remove)

    def take(self, directory: Path) -> str | None:
        """The name that the adapter of a directory has in the model, loaded if need be.

        None while there is no room. UserError if it is missing, damaged, or does not fit the base model.
        """
        name = version_key(directory, checkpoint.WEIGHTS)
        if self._held.take(name) is None:
            if not self._held.make_room():
                return None
            saved = checkpoint.read(directory, self._base, optimizer=False)
            adapter = self._bank.add(name, saved.config, trainable=False)
            try:
                saved.check_fits(adapter)
            except UserError:
                self._bank.remove(name)
                raise
            self._bank.load_state_dict(name, saved.weights)
            adapter.drop_masters()
            self._held.put(name, name)
        return name

    def give_back(self, name: str) -> None:
        """One use less; the adapter stays until room is needed."""
        self._held.give_back(name)
