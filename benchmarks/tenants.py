"""The training engine alone, many tenants at once, beside PEFT with ``set_adapter`` and padding.

Both run in this process on one thread and take turns; what counts is the median over the turns of the ratio of their
CPU-seconds. A step is forward, backward and AdamW for every tenant.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from baselines import PREFERRED, SequentialPeft
from shapes import SMALL, TINY, Shape, batches, tokens_in
from table import Row, held, in_a_process, show

from tuft_jupyter.core.types import AdamParams, ForwardBackward, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine.trainer import PeftTrainer

TENANTS = 16
RANK = 16
LONG, SHORT = (4, (16, 256)), (1, (16, 48))  # datums of each tenant, tokens of each
ROUNDS = {("tiny-fp32", LONG): 3, ("tiny-fp32", SHORT): 9, ("small-bf16", LONG): 1, ("small-bf16", SHORT): 3}
NAMES = {LONG: "long", SHORT: "short"}


class Tenants:
    """Our trainer with one run per tenant."""

    def __init__(
        self,
        model: Path,
        tenants: int,
        *,
        rank: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.trainer = PeftTrainer(model, device=device, dtype=dtype)
        self._runs = [f"tenant{i}" for i in range(tenants)]
        for i, run in enumerate(self._runs):
            spec = LoraSpec(rank=rank, alpha=2 * rank, seed=i, train_unembed=False)
            self.trainer.create(run, spec)

    def step(self, requests: list[ForwardBackward]) -> float:
        """forward_backward and optim_step for every tenant; the summed loss before."""
        results = self.trainer.forward_backward(list(zip(self._runs, requests, strict=True)))
        self.trainer.optim_step([(run, AdamParams(learning_rate=1e-4)) for run in self._runs])
        total = 0.0
        for result in results:
            if not isinstance(result, ForwardBackwardResult):
                raise RuntimeError(f"the trainer failed: {result}")
            total += result.loss_sum
        return total


def measure() -> list[Row]:
    from tuft_jupyter.engine.ray_actors import CPU_MEMORY  # needs more than the engine alone does

    os.environ.update(
        CPU_MEMORY
    )  # both get what the server gives its trainer; malloc reads it when a process starts
    rows = []
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        for shape in (TINY, SMALL):
            model = shape.write(Path(scratch))
            rows += in_a_process(compare, shape, model)
        rows.append(held("memory", *memory(SMALL, model)))
        part, more = memory(TINY, TINY.write(Path(scratch)))
        rows.append(Row("the same of the 4 x 256 model in fp32", f"{part:.3g} x{more}"))
    return rows


def compare(shape: Shape, model: Path) -> list[Row]:
    """Both loads on one model, ours and theirs in turn; the short one first, for it warms up both."""
    torch.set_num_threads(1)
    theirs, ours = SequentialPeft(model, TENANTS, rank=RANK), Tenants(model, TENANTS, rank=RANK)
    warm = batches(shape, TENANTS, *SHORT)
    a, b = theirs.step(warm), ours.step(warm)
    if abs(a - b) > 2e-2 * abs(a):
        raise RuntimeError(f"the loops differ: PEFT's loss {a:.4f}, ours {b:.4f}")
    dtype = ours.trainer.base.dtype
    alike = None if dtype is shape.dtype else SequentialPeft(model, TENANTS, rank=RANK, dtype=dtype)
    rows = []
    for load in (SHORT, LONG):
        requests = batches(shape, TENANTS, *load)
        seconds: dict[str, list[float]] = {"padded": [], "single": [], "alike": [], "ours": []}
        for _ in range(ROUNDS[shape.name, load]):
            seconds["padded"].append(cpu(partial(theirs.step, requests)))
            seconds["ours"].append(cpu(partial(ours.step, requests)))
        if load[0] > 1 and alike is None:
            seconds["single"].append(cpu(partial(theirs.step, requests, padded=False)))
        if alike is not None:
            alike.step(warm)
            seconds["alike"].append(cpu(partial(alike.step, requests)))
        tokens = tokens_in(requests)
        what = f"{TENANTS} tenants x {load[0]} datums of {load[1][0]}..{load[1][1]} tokens, {shape.name}"
        rows.append(Row(f"{what}: ours", f"{tokens / statistics.median(seconds['ours']):.0f} tokens/CPU-s"))
        rows.append(held(f"tenants {NAMES[load]} {shape.name}", ratio(seconds, "padded")))
        for way, words in (
            ("single", "row by row"),
            ("alike", f"in {dtype}, {PREFERRED}"),
        ):
            if seconds[way]:
                rows.append(Row(f"{what}: over PEFT {words}", f"{ratio(seconds, way):.2f} x"))
    return rows


def ratio(seconds: dict[str, list[float]], other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[other], seconds["ours"], strict=False))


def cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def memory(shape: Shape, model: Path) -> tuple[float, str]:
    """Our peak memory of a step, above what is held between steps, over theirs; the two in words.

    Each in a process of its own, both in the dtype of the model's files.
    """
    theirs, ours = (in_a_process(peak_mb, name, shape, model) for name in ("theirs", "ours"))
    return ours / theirs, f" ({ours:.0f} / {theirs:.0f} MB)"


def peak_mb(which: str, shape: Shape, model: Path) -> float:
    """Highest sum of live torch memory in a step, above its start, as torch's own profiler counts it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    loop = (SequentialPeft if which == "theirs" else Tenants)(model, TENANTS, rank=RANK, dtype=shape.dtype)
    requests = batches(shape, TENANTS, *LONG)
    loop.step(batches(shape, TENANTS, 1, (8, 8)))  # gradients and moments are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loop.step(requests)
    events = [
        event
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6


if __name__ == "__main__":
    sys.exit(not show(measure()))
