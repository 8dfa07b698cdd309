"""``make security``: the threat list of SECURITY.md row by row, then hostile requests by the thousand; one table.

A row holds when every test that carries its id in its docstring passes, and there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [*(f"T{n}" for n in range(1, 13)), *(f"H{n}" for n in range(1, 10))]
ID = re.compile(r"\b([TH]\d{1,2})\b")


class Rows:
    """A pytest plugin: outcomes by the row ids in the docstrings of tests."""

    def __init__(self) -> None:
        self.of: dict[str, list[str]] = {}
        self.outcomes: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            ids = [each for each in ID.findall(getattr(item.obj, "__doc__", "") or "") if each in ROWS]  # type: ignore[attr-defined]
            if ids or "tests/security" in item.nodeid:
                self.of[item.nodeid] = ids
                kept.append(item)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid].add(report.outcome)

    def table(self) -> tuple[list[str], bool]:
        lines = ["| row | tests | outcome |", "| --- | --- | --- |"]
        held = True
        for row in ROWS:
            tests = [name for name, ids in self.of.items() if row in ids]
            bad = [name for name in tests if self.outcomes[name] != {"passed"}]
            if not tests:
                said, held = "no test", False
            else:
                said = "holds" if not bad else "FAILS: " + ", ".join(bad)
                held = held and not bad
            lines.append(f"| {row} | {len(tests)} | {said} |")
        return lines, held


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--trials", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=1)
    asked = options.parse_args()
    rows = Rows()
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "tests/vllm" not in str(path) and _mentions(path)
    ]
    pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[rows])
    fuzz = [
        sys.executable,
        "-m",
        "tests.support.fuzz",
        "--trials",
        str(asked.trials),
        "--seed",
        str(asked.seed),
    ]
    thrown = subprocess.run(fuzz, cwd=ROOT, check=False)
    lines, held = rows.table()
    lines.append(
        f"| hostile requests | {asked.trials} of each kind | {'FAILS' if thrown.returncode else 'holds'} |"
    )
    print("\n".join(["", *lines]))
    return 0 if held and not thrown.returncode else 1


def _mentions(path: Path) -> bool:
    return path.parent.name == "security" or any(each in ROWS for each in ID.findall(path.read_text()))


if __name__ == "__main__":
    sys.exit(main())
