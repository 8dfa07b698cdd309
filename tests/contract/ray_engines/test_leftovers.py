"""Whatever becomes of the process that started Ray, nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.actor_tasks import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]

DRIVER = """
import asyncio, os, sys
from pathlib import Path
from tests.support.actors import FaultyTrainingActor
from tuft_jupyter import models
from tuft_jupyter.config import Settings
from tuft_jupyter.core.engine import Task
from tuft_jupyter.core.types import OpKind
from tuft_jupyter.engine import standby
from tuft_jupyter.engine.ray_engines import RayEngines

async def main():
    home = Path(sys.argv[2])
    engine = RayEngines(Settings(home=home, checkpoint_dir=home)).training(models.resolve(sys.argv[1]))
    engine.actor_class = FaultyTrainingActor
    standby.DELAY_SECONDS = 0.0
    await engine.start()
    while engine.standby_pid is None:
        await asyncio.sleep(0.01)
    await engine.step([Task("c", "r", OpKind.CREATE_MODEL, {"lora": {"rank": 2, "alpha": 2.0, "seed": 1}})])
    heavy = sorted({"torch", "transformers", "peft", "vllm"} & set(sys.modules))
    print("ready", engine.pid, engine.standby_pid, ",".join(heavy), flush=True)
    if sys.argv[3] == "wait":
        await asyncio.sleep(600)
    elif sys.argv[3] == "stop":
        await engine.stop()

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["kill", "return", "stop"])
def test_no_process_outlives_the_driver_however_it_ends(end: str, tmp_path: Path) -> None:
    """S3-01, F1: the driver never imports torch; killed, returning or stopping, it leaves nothing within 10 s: neither
    the worker nor the one that stands by.
    """
    how = "wait" if end == "kill" else end
    command = [sys.executable, "-c", DRIVER, "tuft/demo", str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert driver.stdout is not None
        children: list[psutil.Process] = []
        ready = ""
        for line in driver.stdout:
            children = psutil.Process(driver.pid).children(recursive=True)
            if line.startswith("ready"):
                ready = line
                break
        assert ready.split()[3:] == []  # nothing heavy in the driver
        if how == "wait":
            assert {int(pid) for pid in ready.split()[1:3]} <= {process.pid for process in children}
            driver.kill()
        began = time.perf_counter()
        driver.wait(30)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not [process for process in alive if runs(process)]
        assert time.perf_counter() - began < 10
    finally:
        driver.kill()
        driver.wait()


def test_what_ray_starts_late_does_not_outlive_the_driver_either(tmp_path: Path) -> None:
    """F2: on a busy machine Ray's agents come up after its other processes were counted."""
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from tuft_jupyter.engine import ray_local; from tuft_jupyter.engine.ray_runtime import Runtime\n"
        "counted = ray_local.processes\n"
        "ray_local.processes = lambda temp: [p for p in counted(temp) if p.name() in ray_local.VITAL]\n"
        "async def main():\n"
        "    session = await Runtime(Path(sys.argv[1]), None).acquire(0)\n"
        "    print(session.logs, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert driver.stdout is not None
        logs = driver.stdout.readline().strip()
        _until(lambda: len([p for p in _writers(logs) if p.name().startswith("ray::")]) >= 2, 120)
    finally:
        driver.kill()
        driver.wait()
    _until(lambda: not _writers(logs), 30)


def test_a_driver_that_is_killed_while_ray_starts_leaves_nothing_either(tmp_path: Path) -> None:
    """F3, L7: Ray's agents are up, and the driver has not been told yet that Ray is."""
    script = (
        "import asyncio, os, sys, time; from pathlib import Path\n"
        "from tuft_jupyter.engine import ray_local; from tuft_jupyter.engine.ray_runtime import Runtime\n"
        "init = ray_local._init\n"
        "ray_local._init = lambda *given: (init(*given), time.sleep(600))\n"
        "asyncio.run(Runtime(Path(sys.argv[1]), None).acquire(0))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment) as driver:

        def agents() -> list[psutil.Process]:
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    mine = f"_{driver.pid}/logs/"
                    if process.name().startswith("ray::") and any(
                        mine in f.path for f in process.open_files()
                    ):
                        found.append(process)
            return found

        try:
            _until(lambda: len(agents()) >= 2, 120)
        finally:
            driver.kill()
    _until(lambda: not agents(), 30)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _writers(logs: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path.startswith(logs) for file in process.open_files()):
                found.append(process)
    return found
