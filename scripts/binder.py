"""``make binder``: what a Binder does with this repository, here: a clean environment, a fresh clone, and the tour.

Installs ``binder/requirements.txt`` and runs ``binder/postBuild`` as they stand, then opens the quickstart on a real
Jupyter server of that environment (``examples/demo.py``). Ends with 1 if a step fails or the tour takes longer than
three minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOUR_SECONDS = 180.0
OURS = ("TUFT_", "TINKER_", "JUPYTER", "PYTHONPATH", "VIRTUAL_ENV")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tuft-binder-") as scratch:
        clone, environment = Path(scratch, "clone"), Path(scratch, "environment")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        step("environment", scratch, sys.executable, "-m", "venv", str(environment))
        path = f"{environment / 'bin'}{os.pathsep}{os.defpath}"
        env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {
            "PATH": path
        }
        step("requirements", clone, "pip", "install", "--quiet", "-r", "binder/requirements.txt", env=env)
        step("postBuild", clone, str(clone / "binder" / "postBuild"), env=env)
        seconds = step("tour", clone, "python", "examples/demo.py", env=env)
    if seconds > TOUR_SECONDS:
        print(f"the tour took {seconds:.0f} s, more than {TOUR_SECONDS:.0f} s")
        return 1
    return 0


def step(
    name: str, where: str | Path, program: str, *arguments: str, env: dict[str, str] | None = None
) -> float:
    """Run one step; the seconds it took. CalledProcessError if it fails."""
    began = time.monotonic()
    found = shutil.which(program, path=(env or os.environ)["PATH"]) or program
    subprocess.run([found, *arguments], cwd=where, env=env, check=True)
    seconds = time.monotonic() - began
    print(f"binder: {name} in {seconds:.0f} s", flush=True)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
