"""The table that every benchmark fills. Needs nothing but Python, so that the engine alone can be measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from marks import MARKS

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "server_ext")]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``ok`` None has no mark to be held to, ``note`` says what is known of a short one."""

    what: str
    measured: str
    mark: str = ""
    ok: bool | None = None
    note: str = ""


def held(mark: str, measured: float, more: str = "") -> Row:
    """The line of one of the :data:`~marks.MARKS`."""
    found = MARKS[mark]
    ok = found.holds(measured)
    return Row(found.what, f"{measured:.3g}{found.unit}{more}", found.text, ok, "" if ok else found.note)


def at_most(what: str, measured: float, mark: float, unit: str = "", *, note: str = "") -> Row:
    ok = measured <= mark
    return Row(what, f"{measured:.3g}{unit}", f"<= {mark:g}{unit}", ok, "" if ok else note)


def at_least(what: str, measured: float, mark: float, unit: str = "") -> Row:
    return Row(what, f"{measured:.3g}{unit}", f">= {mark:g}{unit}", measured >= mark)


def in_a_process(work: Callable[..., T], *arguments: object) -> T:
    """The same in a process of its own: none is slower for what another one has loaded and left behind."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        return other.submit(work, *arguments).result()


def show(rows: Sequence[Row]) -> bool:
    """Print the table; True if nothing falls short."""
    lines = [("what", "measured", "mark", "ok or short")]
    lines += [(r.what, r.measured, r.mark, {None: "", True: "ok", False: "short"}[r.ok]) for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        print(" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in (row for row in rows if row.note):
        print(f"\nshort: {row.what}\n  {row.note}")
    return all(row.ok is not False for row in rows)
