"""Everybody on a Hub trains at once: ``python -m tests.support.hub_trial --users 30``. Prints one table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.hubs import Hub
from tests.support.live import until


@dataclass(frozen=True)
class Outcome:
    """``fairness`` is Jain's index of the tokens each had trained when the first one finished."""

    users: int
    finished: int
    fairness: float
    trespasses: int
    errors: list[str]
    seconds: float


def jain(shares: list[float]) -> float:
    """Jain, Chiu & Hawe (1984): 1 when all are equal, 1/n when one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def everybody(hub: Hub, count: int, steps: int, seconds: float = 500) -> Outcome:
    """Users with servers of their own train at the same time, and then try each other's runs."""
    names = [f"user{n:02d}" for n in range(count)]
    tokens = {name: hub.user(name) for name in names}
    homes = hub.work / "homes"
    for name in names:
        hub.start(name, wait=False)
    until(lambda: all(_there(homes / name) for name in names), seconds, "everybody is connected")
    began = time.monotonic()
    (homes / "go").touch()
    until(
        lambda: all((homes / name / "result.json").exists() for name in names), seconds, "everybody finishes"
    )
    took = time.monotonic() - began
    results = {name: json.loads((homes / name / "result.json").read_text()) for name in names}
    errors = [f"{name}: {result['error']}" for name, result in results.items() if "error" in result]
    runs = {name: result["run"] for name, result in results.items() if "run" in result}
    curves = {name: _curve(hub, tokens[name], run) for name, run in runs.items()}
    first = min(curve["time"][-1] for curve in curves.values())
    shares = [
        sum(n for at, n in zip(curve["time"], curve["tokens"], strict=True) if at <= first)
        for curve in curves.values()
    ]
    finished = sum(1 for name, result in results.items() if len(result.get("losses", ())) == steps)
    return Outcome(count, finished, jain(shares), _trespasses(hub, tokens, runs), errors, took)


def _there(home: Path) -> bool:
    return (home / "ready").exists() or (home / "result.json").exists()


def _curve(hub: Hub, token: str, run: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = hub.tuft("GET", f"tuft/runs/{run}/curve", token)["columns"]
    return found


def _trespasses(hub: Hub, tokens: dict[str, str], runs: dict[str, str]) -> int:
    """How often somebody reached somebody else's run; and a foreign run looks like none at all."""
    reached = 0
    names = list(runs)
    for n, name in enumerate(names):
        for other in (names[n - 1], names[n - 2]):
            if other == name:
                continue
            reached += _status(hub, tokens[name], runs[other]) != _status(hub, tokens[name], "nobody:train:0")
    return reached


def _status(hub: Hub, token: str, run: str) -> tuple[int, str]:
    asked: Any = {"model_id": run}
    try:
        hub.tuft("POST", "get_info", token, asked)
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode().replace(run, "X")
    return 200, ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--users", type=int, default=30)
    options.add_argument("--steps", type=int, default=20)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub-") as work:
        cmd = [sys.executable, "-m", "tests.support.hub_user"]
        env = {"TEST_STEPS": str(asked.steps)}
        with Hub("shared_service.py", Path(work), cmd=cmd, spawner_env=env) as hub:
            outcome = everybody(hub, asked.users, asked.steps)
    print("| users at once | finished | Jain fairness of tokens | reached a foreign run | seconds |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {outcome.users} | {outcome.finished} | {outcome.fairness:.3f} | {outcome.trespasses} "
        f"| {outcome.seconds:.0f} |"
    )
    for error in outcome.errors:
        print(error)
    held = outcome.finished == outcome.users and outcome.fairness >= 0.95 and not outcome.trespasses
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
