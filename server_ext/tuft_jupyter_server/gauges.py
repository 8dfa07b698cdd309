"""What the machine is doing: CPU, memory, loop lag, and the workers by process, sampled only while a client watches.

Reading ``/proc`` blocks, so it happens in a thread, once per interval for all watchers: always the same thread, since
psutil tells the use of the processors since the calling thread last asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from tuft_jupyter.core.engine import RunMemory
from tuft_jupyter_server.gpus import gpus

STARTED = time.time()
"""When this server began. The next one may count its records to the same number, where nothing keeps them."""
INTERVAL = 1.0
"""Seconds between two samples."""

Workers = Callable[[], list[tuple[str, int]]]
Memory = Callable[[], Awaitable[Mapping[str, RunMemory]]]


async def _nothing() -> Mapping[str, RunMemory]:
    return {}


class Gauges:
    """``latest`` is the newest sample as the lab shows it, ``runs`` what each run takes in memory (not for everybody).

    ``workers`` names worker processes by pid; ``memory`` asks them of their runs, and answers when they come to it.
    """

    def __init__(self, workers: Workers = list, memory: Memory = _nothing) -> None:
        self.workers = workers
        self.latest: dict[str, Any] = {}
        self.runs: Mapping[str, RunMemory] = {}
        self._memory = memory
        self._asking: asyncio.Task[None] | None = None
        self._watchers = 0
        self._sampled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "tuft-gauges")
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
            if not self._watchers:
                for task in filter(None, (self._task, self._asking)):
                    task.cancel()
                self._task = self._asking = None
                self.latest, self.runs = {}, {}  # whoever looks next is not shown how it was then

    async def fresh(self) -> dict[str, Any]:
        """The next sample, within two intervals."""
        with self.watched():
            await self._sampled.wait()
            return self.latest

    async def _sample_for_ever(self) -> None:
        await self._sample()  # what a processor did is told since the sample before: this one is the first
        while True:
            if self._asking is None or self._asking.done():  # a worker in a long step answers after it
                self._asking = asyncio.get_running_loop().create_task(self._ask())
            asked = time.perf_counter()
            await asyncio.sleep(INTERVAL)
            late = time.perf_counter() - asked - INTERVAL
            self.latest = {**await self._sample(), "loop_lag_ms": round(max(late, 0.0) * 1000, 2)}
            self._sampled.set()
            self._sampled.clear()

    async def _sample(self) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, self.workers())

    async def _ask(self) -> None:
        self.runs = await self._memory()

    def _read(self, workers: list[tuple[str, int]]) -> dict[str, Any]:
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
