"""What the machine is doing: CPU, memory, loop lag, and the workers by process, sampled only while a client watches.

Reading ``/proc`` blocks, so it happens in a thread, once per interval for all watchers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from tuft_jupyter_server.gpus import gpus

INTERVAL = 1.0
"""Seconds between two samples."""

Workers = Callable[[], list[tuple[str, int]]]


class Gauges:
    """``latest`` is the newest sample as the lab shows it; ``workers`` names worker processes by pid."""

    def __init__(self, workers: Workers = list) -> None:
        self.workers = workers
        self.latest: dict[str, Any] = {}
        self._watchers = 0
        self._sampled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._processes: dict[int, psutil.Process] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Sample while at least one such block is open."""
        self._watchers += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._sample_for_ever())
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def fresh(self) -> dict[str, Any]:
        """The next sample, within two intervals."""
        with self.watched():
            await self._sampled.wait()
            return self.latest

    async def _sample_for_ever(self) -> None:
        while True:
            workers = self.workers()
            sample = await asyncio.to_thread(self._sample, workers)
            asked = time.perf_counter()
            await asyncio.sleep(INTERVAL)
            late = time.perf_counter() - asked - INTERVAL
            self.latest = {**sample, "loop_lag_ms": round(max(late, 0.0) * 1000, 2)}
            self._sampled.set()
            self._sampled.clear()

    def _sample(self, workers: list[tuple[str, int]]) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        devices, held = gpus()
        shown = [{"name": "notebook server", **self._process(psutil.Process().pid)}]
        shown += [{"name": name, **self._process(pid)} for name, pid in workers]
        self._processes = {p["pid"]: self._processes[p["pid"]] for p in shown if p["pid"] in self._processes}
        for process in shown:
            process["gpu_memory"] = held.get(process["pid"], 0)
        return {
            "time": time.time(),
            "cpu": psutil.cpu_percent(),
            "memory": {"used": memory.total - memory.available, "total": memory.total},
            "workers": shown,
            "gpus": devices,
        }

    def _process(self, pid: int) -> dict[str, Any]:
        try:
            process = self._processes.setdefault(pid, psutil.Process(pid))
            return {"pid": pid, "cpu": process.cpu_percent(), "memory": process.memory_info().rss}
        except psutil.Error:
            return {"pid": pid, "cpu": 0.0, "memory": 0}
