"""A cache of things that are expensive to load: at most so many are kept, and the least recently used is evicted first.

Uses are counted, and what is in use is never evicted. Knows nothing of what it keeps; for one thread (or one event
loop).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from tuft_jupyter.core.errors import NotFound

T = TypeVar("T")


class LruCache(Generic[T]):
    """``drop`` is called with what is evicted."""

    def __init__(self, capacity: int, drop: Callable[[T], None]) -> None:
        self.capacity = capacity
        self._drop = drop
        self._held: OrderedDict[str, T] = OrderedDict()  # least recently used first
        self._uses: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def items(self) -> list[T]:
        """What is kept, least recently used first."""
        return list(self._held.values())

    def idle(self) -> list[tuple[str, T]]:
        """What nobody uses now, with its key."""
        return [(key, item) for key, item in self._held.items() if not self._uses[key]]

    def take(self, key: str) -> T | None:
        """What is kept under a key, from now on used once more; None if there is nothing."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        self._uses[key] += 1
        return self._held[key]

    def make_room(self) -> bool:
        """True if one more may be put, dropping what nobody uses if need be."""
        return len(self._held) < self.capacity or self.drop_one()

    def drop_one(self) -> bool:
        """Drop what nobody uses and was used least recently; False if all is in use."""
        idle = next((key for key in self._held if not self._uses[key]), None)
        if idle is not None:
            self.forget(idle)
        return idle is not None

    def put(self, key: str, item: T) -> T:
        """Keep something new, used once."""
        self._held[key] = item
        self._uses[key] = 1
        return item

    def give_back(self, key: str) -> int:
        """One use less, returns how many are left; it stays until room is needed."""
        self._uses[key] -= 1
        return self._uses[key]

    def forget(self, key: str) -> None:
        """Drop it now."""
        del self._uses[key]
        self._drop(self._held.pop(key))


def version_key(directory: Path, file: str) -> str:
    """A key for what lies in a directory now: another one as soon as ``file`` is written again.

    NotFound if it is no longer there.
    """
    try:
        found = (directory / file).stat()
    except OSError:
        raise NotFound(f"the saved weights {directory.name!r} are no longer there; save them again") from None
    return f"{directory}@{found.st_ino}.{found.st_mtime_ns}"
