"""What the faults share: a fault is a bench that is set up once, on which trials are run, each with its own chance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from random import Random

Trial = Callable[[Random], str]
"""Raises AssertionError if the promise is broken; returns what was seen, in words ('' for nothing to tell)."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``row`` is its id in the list of faults, ``what`` happens, ``holds`` is what must be true afterwards.

    ``bench`` sets up in an empty directory and gives the trial. Of N trials that are asked for, ``share`` are run.
    """

    row: str
    what: str
    holds: str
    bench: Callable[[Path], AbstractContextManager[Trial]]
    share: float = 1.0
