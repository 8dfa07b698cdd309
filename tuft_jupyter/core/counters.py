"""Numbers that only grow, for whoever watches the server: by name and labels, since its start.

A series is made when it is first counted. Whoever counts takes labels from small fixed sets, never from what a client
sent; beyond :data:`SERIES` a new one is counted under its name alone, so memory stays bounded whatever happens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

SERIES = 2000

Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Series:
    """One number, as a metrics endpoint shows it."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Counters:
    def __init__(self) -> None:
        self._values: Counter[Key] = Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        key = (name, tuple(sorted(labels.items())))
        if key not in self._values and len(self._values) >= SERIES:
            key = (name, ())
        self._values[key] += amount  # type: ignore[assignment]

    def series(self) -> list[Series]:
        """All of them, in order of name and labels."""
        return [Series(name, labels, value) for (name, labels), value in sorted(self._values.items())]
