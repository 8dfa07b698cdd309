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
from baselines import PREFERRED, PeftGenerate, write_adapters
from shapes import SMALL, TINY, Shape
from table import Row, held, show

from tuft_jupyter.core.types import Int32Array, SampleRequest, SampleResult, SamplingParams
from tuft_jupyter.engine.torch_sampler import TorchSampler

SEQUENCES, ADAPTERS, RANK = 64, 4, 16
PROMPT = (16, 64)
NEW = {"tiny-fp32": 64, "small-bf16": 24}
TURNS = {"tiny-fp32": 3, "small-bf16": 1}


class Ours:
    """The sampler with all requests there at once, as when many tenants ask."""

    def __init__(self, model: Path, adapters: list[Path], live: int = SEQUENCES) -> None:
        self.sampler = TorchSampler(model, max_live=live)
        self.adapters = adapters

    def draw(self, prompts: list[Int32Array], new: int) -> int:
        """New tokens drawn."""
        params = SamplingParams(max_tokens=new, stop_tokens=())
        for i, prompt in enumerate(prompts):
            adapter = self.adapters[i * len(self.adapters) // len(prompts)]
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
    new, prompts = NEW[shape.name], prompts_for(shape)
    ours, theirs = Ours(model, adapters), PeftGenerate(model, adapters, new)
    few = prompts[:2]  # what one sequence costs does not depend on how many there are
    ways: dict[str, Callable[[], int]] = {
        "ours": lambda: ours.draw(prompts, new),
        "PEFT mixed batch": lambda: theirs.mixed(prompts),
        "generate per tenant": lambda: theirs.per_tenant(prompts),
        "one at a time": lambda: theirs.alone(few),
    }
    dtype = ours.sampler.base.dtype
    if dtype is not shape.dtype:
        alike = PeftGenerate(model, adapters, new, dtype)
        ways[f"PEFT mixed batch in {dtype}, {PREFERRED}"] = lambda: alike.mixed(prompts)
    ours.draw(few, 2)
    speed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS[shape.name]):
        for name, draw in ways.items():
            speed[name].append(speed_of(draw))
    what = f"{SEQUENCES} sequences over {ADAPTERS} adapters, {shape.name}: ours"
    rows = [Row(what, f"{statistics.median(speed['ours']):.0f} tokens/CPU-s")]
    for name in list(ways)[1:]:
        ratio = statistics.median(a / b for a, b in zip(speed["ours"], speed[name], strict=True))
        more = f" ({statistics.median(speed[name]):.0f})"
        if name.endswith(PREFERRED):
            rows.append(Row(f"{what} over {name}", f"{ratio:.3g} x{more}"))
        else:
            rows.append(held(f"decode {shape.name} {name}", ratio, more))
    return rows


def prompts_for(shape: Shape) -> list[Int32Array]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(PROMPT[0], PROMPT[1] + 1, SEQUENCES)
    return [rng.integers(0, shape.vocab, length).astype(np.int32) for length in lengths]


def speed_of(draw: Callable[[], int]) -> float:
    """Tokens per CPU-second."""
    began = time.process_time()
    drawn = draw()
    return drawn / (time.process_time() - began)


if __name__ == "__main__":
    sys.exit(not show(measure()))
