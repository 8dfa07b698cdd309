"""Every promise and every fault on the lists is carried by a test that names it, and has a row where people read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTS = {"P": 7, "F": 19, "L": 10, "H": 9, "T": 12, "M": 10}
"""How long each list is: promises, faults, load, hostile input, tenancy, and what must not be found."""
ID = re.compile(r"\b([PFLHTM])(\d{1,2})\b")


def named() -> Iterator[str]:
    """The ids in the docstrings of tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield from (letter + number for letter, number in ID.findall(ast.get_docstring(node) or ""))


def rows(page: str) -> set[str]:
    """The ids in the first cells of table rows; ``H1-H9`` is all of them."""
    found: set[str] = set()
    for cell in re.findall(r"^\| ([^|]*) \|", (ROOT / page).read_text(), re.MULTILINE):
        for letter, first, last in re.findall(r"\b([A-Z])(\d+)(?:-[A-Z](\d+))?\b", cell):
            found |= {f"{letter}{i}" for i in range(int(first), int(last or first) + 1)}
    return found


def listed(letters: str) -> set[str]:
    return {f"{letter}{i + 1}" for letter in letters for i in range(LISTS[letter])}


def test_every_promise_and_every_fault_is_named_by_a_test() -> None:
    assert not listed("PFLHTM") - set(named())


@pytest.mark.parametrize(("letters", "page"), [("FL", "docs/reliability.md"), ("HT", "SECURITY.md")])
def test_every_fault_has_a_row_with_what_was_reached(letters: str, page: str) -> None:
    assert not listed(letters) - rows(page)
