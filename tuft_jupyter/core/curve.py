"""A run's curve, one column of numbers for each thing that is told of a step: eight bytes a number, gaps allowed.

Written as lists of Python numbers, curves would be most of what a server remembers.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

CURVE_COLUMNS = ("step", "time", "loss", "tokens", "grad_norm", "learning_rate", "kl")
WHOLE = ("step", "tokens")
"""Columns of whole numbers, which have no gaps."""

Number = float | None


class Column(Sequence[Number]):
    """Float64 numbers, None where there is none; with ``whole``, int64."""

    __slots__ = ("_values",)

    def __init__(self, values: Iterable[Number] = (), *, whole: bool = False) -> None:
        self._values: array[Any] = array("q" if whole else "d")
        for value in values:
            self.append(value)

    def append(self, value: Number) -> None:
        if self._values.typecode == "q":
            self._values.append(int(value or 0))
        else:
            self._values.append(math.nan if value is None else value)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Number]:
        return (None if value != value else value for value in self._values)  # NaN is not itself

    @overload
    def __getitem__(self, at: int) -> Number: ...

    @overload
    def __getitem__(self, at: slice) -> list[Number]: ...

    def __getitem__(self, at: int | slice) -> Number | list[Number]:
        if isinstance(at, slice):
            return [None if value != value else value for value in self._values[at]]
        value = self._values[at]
        return None if value != value else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Column({list(self)!r})"


def new_curve() -> dict[str, Column]:
    return {name: Column(whole=name in WHOLE) for name in CURVE_COLUMNS}
