"""Adapters for sampling: loaded from checkpoint directories once, kept while they are of use.

The key is the directory and what lies in it now, so a checkpoint saved again under the same name is read again.
At most ``capacity`` adapters are held; the one used least recently goes first, never one that is in use. Knows
nothing of requests: whoever takes an adapter gives it back.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from tuft_jupyter.core.errors import NotFound
from tuft_jupyter.engine import checkpoint
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.lora import AdapterBank


class AdapterCache:
    """Not for several threads: adapters are injected into the model that decodes."""

    def __init__(self, base: BaseModel, capacity: int) -> None:
        self._base = base
        self._bank = AdapterBank(base)
        self._capacity = capacity
        self._uses: OrderedDict[str, int] = OrderedDict()  # least recently taken first

    def take(self, directory: Path) -> str | None:
        """The name of the adapter of a directory in the model, loaded if need be; None while there is no room.

        UserError if it is missing, damaged, or does not fit the base model.
        """
        name = _identity(directory)
        if name not in self._uses:
            if len(self._uses) >= self._capacity and not self._evict():
                return None
            self._load(name, directory)
            self._uses[name] = 0
        self._uses[name] += 1
        self._uses.move_to_end(name)
        return name

    def give_back(self, name: str) -> None:
        """One use less; the adapter stays loaded until room is needed."""
        self._uses[name] -= 1

    def _evict(self) -> bool:
        for name, uses in self._uses.items():
            if not uses:
                del self._uses[name]
                self._bank.remove(name)
                return True
        return False

    def _load(self, name: str, directory: Path) -> None:
        saved = checkpoint.read(directory, self._base, optimizer=False)
        adapter = self._bank.add(name, saved.config, trainable=False)
        try:
            saved.check_fits(adapter)
            self._bank.load_state_dict(name, saved.weights)
        except BaseException:
            self._bank.remove(name)
            raise


def _identity(directory: Path) -> str:
    try:
        found = (directory / checkpoint.WEIGHTS).stat()
    except OSError:
        raise NotFound(f"the saved weights {directory.name!r} are no longer there; save them again") from None
    return f"{directory}@{found.st_ino}.{found.st_mtime_ns}"
