"""``GpuMeter``: what the server's machine does, live."""

from __future__ import annotations

from typing import Any

from tuft_jupyter.kernel.report import size
from tuft_jupyter.kernel.widgets.live import Live, script


class GpuMeter(Live):
    """GPUs, processors and memory of the server's machine, and its workers; measured once a second while it is seen."""

    _esm = script("gpu_meter")

    def look(self, patience: float) -> dict[str, Any]:
        return {"gauges": self.client.gauges()}  # the server answers with its next measurement

    def words(self) -> str:
        now = self.client.gauges()
        gpus = [
            f"{gpu.get('name', 'GPU')} {gpu.get('utilization', 0):.0f} %" for gpu in now.get("gpus") or []
        ]
        memory = f"memory {size(now['memory']['used'])} of {size(now['memory']['total'])}"
        return "; ".join([*(gpus or ["no GPU"]), f"CPU {now['cpu']:.0f} %", memory])
