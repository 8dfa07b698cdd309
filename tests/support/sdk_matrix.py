"""One script, every SDK: ``make sdk-matrix`` runs it and prints the table of the README.

Each version has an environment of its own: a directory with that SDK, and with whatever it needs that is not installed
here or in another version, put before the packages of the environment this runs in (torch and transformers are
shared). The directories are kept below ``.venv/.sdk``; making them needs the package registry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from examples.run_on_server import Server
from tests.support.live import TO_THE_END, environment, key_of

VERSIONS = ("0.16.1", "0.18.2", "0.22.7", "0.25.0", "0.27.2", "0.30.4", "0.34.0", "0.38.0")
"""The newest in the registry comes on top, if it is none of these."""

STEPS = 40
TOLERANCE = 1e-6
SCRIPT = Path(__file__).with_name("sdk_matrix_script.py")
PARTS = ("training", "sampling", "save/resume", "REST")
ENVIRONMENTS = Path(sys.prefix) / ".sdk"


@dataclass(frozen=True)
class Report:
    """``parts`` maps each part of the script to "ok" or its traceback; ``numbers`` have to agree between versions."""

    version: str
    parts: Mapping[str, str]
    numbers: Mapping[str, Sequence[float]]

    @property
    def steps(self) -> int:
        return len(self.numbers.get("grad_norm", ()))

    @property
    def passed(self) -> bool:
        return self.steps == STEPS and all(self.parts.get(part) == "ok" for part in PARTS)

    def apart(self, other: Report) -> float:
        """The largest relative difference of any number; infinite if there is not the same number of each."""
        names = {*self.numbers, *other.numbers}
        pairs = [(self.numbers.get(name, ()), other.numbers.get(name, ())) for name in names]
        if any(len(mine) != len(theirs) for mine, theirs in pairs):
            return float("inf")
        return max(
            (
                abs(a - b) / max(abs(a), abs(b), sys.float_info.min)
                for pair in pairs
                for a, b in zip(*pair, strict=True)
            ),
            default=float("inf"),
        )


def newest() -> str:
    """The newest release in the registry."""
    asked = pip(
        "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--report", "-", "tinker"
    )
    found: str = json.loads(asked)["install"][0]["metadata"]["version"]
    return found


def sdk(wanted: str) -> Path:
    """The directory to import that SDK from; made if it is not there."""
    place = ENVIRONMENTS / wanted
    if not place.exists():
        fresh = ENVIRONMENTS / f"{wanted}.{os.getpid()}"
        pip("install", "--quiet", "--no-deps", "--target", os.fspath(fresh), f"tinker=={wanted}")
        if missing := unmet(fresh):
            pip("install", "--quiet", "--target", os.fspath(fresh), *missing)
        fresh.rename(place)
    return place


def unmet(place: Path) -> list[str]:
    """What the SDK in ``place`` requires and the environment this runs in does not give."""
    (found,) = distributions(name="tinker", path=[os.fspath(place)])
    return [text for text in found.requires or () if not met(Requirement(text))]


def met(needed: Requirement) -> bool:
    if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
        return True
    try:
        return needed.specifier.contains(version(needed.name), prereleases=True)
    except PackageNotFoundError:
        return False


def pip(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed:\n{done.stderr}")
    return done.stdout


def run(wanted: str, address: str, key: str, home: Path) -> Report:
    """Run the script with that SDK against the server at ``address``. RuntimeError if it did not come to its end."""
    env = environment(
        home, TINKER_BASE_URL=address, TINKER_API_KEY=key, TINKER_TELEMETRY="1", HF_HUB_OFFLINE="1"
    )
    env["PYTHONPATH"] = os.fspath(sdk(wanted))
    done = subprocess.run(
        [*TO_THE_END, os.fspath(SCRIPT)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"the script ended with status {done.returncode} on tinker {wanted}:\n{done.stderr[-3000:]}"
        )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == wanted, f"imported tinker {told['version']}, not {wanted}"
    return Report(told["version"], told["parts"], told["numbers"])


def table(reports: Sequence[Report]) -> str:
    """What the README shows; numbers are compared with the last report's."""
    lines = [["SDK", *PARTS, "losses equal"], ["---"] * (len(PARTS) + 2)]
    for report in reports:
        apart = report.apart(reports[-1])
        equal = "yes, every bit" if apart == 0 else f"to {apart:.0e}" if apart <= TOLERANCE else "**no**"
        marks = ["yes" if report.parts.get(part) == "ok" else "**no**" for part in PARTS]
        lines.append([report.version, *marks, equal])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    wanted = [*dict.fromkeys((*VERSIONS, newest()))]
    reports = []
    with tempfile.TemporaryDirectory() as work:
        home = Path(work)
        with Server(home, home, base_url="/user/alice/", env=environment(home)) as server:
            for one in wanted:
                reports.append(run(one, f"{server.url}tuft", key_of(home), home))
                for part, outcome in reports[-1].parts.items():
                    if outcome != "ok":
                        print(f"tinker {one}, {part}:\n{outcome}", file=sys.stderr)
    print(table(reports))
    if not all(report.passed and report.apart(reports[-1]) <= TOLERANCE for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
