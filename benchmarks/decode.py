"""The torch sampler with several adapters in one batch, beside three ways to do it with transformers and PEFT.

PEFT's mixed batch (``adapter_names``), ``generate`` for one tenant after the other, and one sequence at a time. All run
in this process on one thread and take turns; figures are new tokens per CPU-second, medians over the turns.
With ``--tiny`` only the smaller model.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from baselines import PeftGenerate, write_adapters
from common import Row, at_least, show
from shapes import SMALL, TINY, Shape

from tuft_jupyter.core.types import Int32Array, SampleRequest, SampleResult, SamplingParams
from tuft_jupyter.engine.torch_sampler import TorchSampler

SEQUENCES, ADAPTERS, RANK = 64, 4, 16
PROMPT = (16, 64)
NEW = 64
TURNS = {"tiny-fp32": 5, "small-bf16": 2}
MARKS = {"PEFT mixed batch": 2.5, "generate per tenant": 3.0, "one at a time": 17.0}


class Ours:
    """The sampler with all requests there at once, as when many tenants ask."""

    def __init__(self, model: Path, adapters: list[Path]) -> None:
        self.sampler = TorchSampler(model, max_live=SEQUENCES)
        self.adapters = adapters

    def draw(self, prompts: list[Int32Array]) -> int:
        """New tokens drawn."""
        params = SamplingParams(max_tokens=NEW, stop_tokens=())
        for i, prompt in enumerate(prompts):
            adapter = self.adapters[i * ADAPTERS // len(prompts)]
            self.sampler.submit(str(i), adapter, SampleRequest(prompt, 1, params))
        drawn = 0
        while self.sampler.busy():
            for _, result in self.sampler.step():
                if not isinstance(result, SampleResult):
                    raise SystemExit(f"the sampler failed: {result}")
                drawn += sum(len(sequence.tokens) for sequence in result.sequences)
        return drawn


def measure() -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        for shape in (TINY,) if "--tiny" in sys.argv else (TINY, SMALL):
            model = shape.write(Path(scratch))
            rows += compare(
                shape, model, write_adapters(Path(scratch) / f"{shape.name}-lora", model, ADAPTERS, RANK)
            )
    return rows


def compare(shape: Shape, model: Path, adapters: list[Path]) -> list[Row]:
    """All four ways in turn on one model."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(PROMPT[0], PROMPT[1] + 1, SEQUENCES)
    prompts = [rng.integers(0, shape.vocab, length).astype(np.int32) for length in lengths]
    ours, theirs = Ours(model, adapters), PeftGenerate(model, adapters, NEW)
    few = prompts[:2]  # what one sequence costs does not depend on how many there are
    ways: dict[str, Callable[[], int]] = {
        "ours": lambda: ours.draw(prompts),
        "PEFT mixed batch": lambda: theirs.mixed(prompts),
        "generate per tenant": lambda: theirs.per_tenant(prompts),
        "one at a time": lambda: theirs.alone(few),
    }
    speed: dict[str, list[float]] = {name: [] for name in ways}
    ours.draw(few)
    for _ in range(TURNS[shape.name]):
        for name, draw in ways.items():
            began = time.process_time()
            drawn = draw()
            speed[name].append(drawn / (time.process_time() - began))
    rows = [
        Row(
            f"{shape.name}, {SEQUENCES} sequences over {ADAPTERS} adapters",
            f"{_middle(speed['ours']):.0f} tokens/CPU-s",
        )
    ]
    for name, mark in MARKS.items():
        ratio = _middle([a / b for a, b in zip(speed["ours"], speed[name], strict=True)])
        rows.append(at_least(f"  over {name} ({_middle(speed[name]):.0f})", ratio, mark, " x"))
    return rows


def _middle(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    sys.exit(not show(measure()))
