"""What a sub-command is: its name, its words of help, its options, and what it does.

``run`` gets the parsed options and returns what the cell shows (None where progress was shown already) or, where
``returns`` is set, an object for the program; it fails by TuftConnectionError alone. ``complete`` offers words for the
command's argument; it may ask the server, and offers nothing where there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _no_options(_: argparse.ArgumentParser) -> None:
    """A command that takes nothing."""


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    help: str
    run: Callable[[argparse.Namespace], Any]
    options: Callable[[argparse.ArgumentParser], None] = _no_options
    description: str = ""
    example: str = ""
    complete: Callable[[], list[str]] = list
    returns: bool = False


class Text(str):
    """Text that the notebook shows as it is, without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
