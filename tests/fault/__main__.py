"""``python -m tests.fault --trials 100 --seed 1 F1 F4``: run the trials, print a table; 1 if a promise broke."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from tests.fault import files, kills, order
from tests.fault.bench import Fault

FAULTS = [*kills.FAULTS, *files.FAULTS, *order.FAULTS]
MARK = "<!-- what follows is written by `make fault` -->"
HEAD = """\
| row | fault | what must hold | held | longer than undisturbed, median / p95 | seed, commit, date |
| --- | --- | --- | --- | --- | --- |
"""


def run(fault: Fault, trials: int, seed: int, commit: str) -> tuple[str, bool]:
    """One line of the table, and whether the promise held in all trials."""
    held, told = 0, []
    with tempfile.TemporaryDirectory(prefix="tuft-fault-") as scratch, fault.bench(Path(scratch)) as trial:
        for number in range(trials):
            try:
                told.append(trial(Random(f"{fault.row} {seed} {number}")))
                held += 1
            except Exception:  # noqa: BLE001 - any of them breaks the promise
                print(f"{fault.row}, trial {number} of seed {seed}:", file=sys.stderr)
                traceback.print_exc()
            print(f"{fault.row} {number + 1}/{trials}, held {held}", file=sys.stderr, flush=True)
    when = f"{seed}, {commit}, {datetime.now(UTC):%Y-%m-%d}"
    line = f"| {fault.row} | {fault.what} | {fault.holds} | {held} of {trials} |{summary(told)} | {when} |"
    return line, held == trials


def summary(told: list[str]) -> str:
    """The median and the 95th percentile, where trials tell seconds."""
    seconds = sorted(float(each) for each in told if each)
    if not seconds:
        return ""
    return f" {seconds[len(seconds) // 2]:.1f} / {seconds[math.ceil(0.95 * (len(seconds) - 1))]:.1f} s"


def write(page: Path, lines: list[str]) -> None:
    """Put the lines into the table at the end of a page; rows of it that were not run now stay."""
    text, _, table = page.read_text().partition(MARK)
    rows = {row_of(line): line for line in [*table.splitlines(), *lines]}
    kept = [rows[fault.row] for fault in FAULTS if fault.row in rows]
    page.write_text(f"{text}{MARK}\n\n{HEAD}" + "\n".join(kept) + "\n")


def row_of(line: str) -> str:
    return line.split("|")[1].strip() if line.startswith("|") else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fault")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="a page in whose table the rows are replaced")
    parser.add_argument("rows", nargs="*", help="F1 F2 ... (default: all)")
    told = parser.parse_args()
    chosen = [fault for fault in FAULTS if not told.rows or fault.row in told.rows]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines: list[str] = []
    good = True
    for fault in chosen:
        line, held = run(fault, max(1, round(told.trials * fault.share)), told.seed, commit)
        lines.append(line)
        print(line, file=sys.stderr, flush=True)
        good &= held
    print(HEAD + "\n".join(lines))
    if told.write:
        write(told.write, lines)
    return not good


if __name__ == "__main__":
    sys.exit(main())
