"""What each GPU that this server was given does, and what each process holds of it, as NVIDIA's own library tells.

A machine without a GPU, without its driver or without the library has none. Calls block for milliseconds: use a thread.
"""

from __future__ import annotations

import os
from typing import Any

from tuft_jupyter.machine import local_gpu


def gpus() -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Per device ``name``, ``used`` and ``total`` (bytes) and ``utilization`` (percent); bytes held, by process id."""
    try:
        import pynvml as nvml
    except ImportError:
        return [], {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, or no device
        return [], {}
    devices: list[dict[str, Any]] = []
    held: dict[int, int] = {}
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if not _is_meant(index, nvml.nvmlDeviceGetUUID(handle)):
                continue
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = nvml.nvmlDeviceGetName(handle)
            devices.append(
                {
                    "name": f"GPU {index} ({name.decode() if isinstance(name, bytes) else name})",
                    "used": int(memory.used),
                    "total": int(memory.total),
                    "utilization": _utilization(nvml, handle),
                }
            )
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                held[process.pid] = held.get(process.pid, 0) + (process.usedGpuMemory or 0)
    except nvml.NVMLError:
        pass  # a device that went away, or a slice that hides its numbers: what was read so far holds
    finally:
        nvml.nvmlShutdown()
    return devices, held


def _is_meant(index: int, uuid: str | bytes) -> bool:
    """Whether this process was given the GPU. A slice does not tell of which one it is: then all are shown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "MIG-" in visible:
        return True
    name = uuid.decode() if isinstance(uuid, bytes) else uuid
    return local_gpu(index, name, visible) is not None


def _utilization(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except nvml.NVMLError:  # a slice of a GPU does not tell
        return 0.0
