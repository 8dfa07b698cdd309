"""In which precision a base model computes where nobody says: that of its files, or fp32 on a CPU that prefers it.

Most models are stored in bf16. A GPU computes with it twice as fast as in fp32, and so does a CPU with AMX or an AMD
one with AVX-512 BF16. Other CPUs have to convert every number first, or have an instruction for it that is half as
fast as that for fp32. Half precision (fp16) overflows in gradients; a CPU computes such models in fp32 as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from tuft_jupyter.engine import memory

NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By the names that a configuration has for them; ``auto`` is none of these."""

SHARE = 0.25
"""Of the memory, what the weights may take in fp32: trainer and sampler each have them."""

_CLEARLY = 1.25
"""How many times as fast bf16 must be: no machine known is near it, so each start of a server finds the same."""


def chosen(directory: Path, device: str) -> torch.dtype | None:
    """The dtype to load a model's files in, on a ``cpu`` or ``cuda``; None is their own.

    OSError or SafetensorError: they cannot be read.
    """
    if device != "cpu":
        return None
    if memory.weights(directory, torch.float32) > SHARE * memory.total():
        return None
    return None if "BF16" in memory.stored(directory) and bf16_pays() else torch.float32


@cache
def bf16_pays() -> bool:
    """Whether this CPU multiplies matrices clearly faster in bf16 than in fp32: measured in a fraction of a second."""
    bf16, fp32 = (_multiply(dtype) for dtype in (torch.bfloat16, torch.float32))
    bf16(), fp32()
    rounds = [(_seconds(bf16), _seconds(fp32)) for _ in range(15)]
    return _CLEARLY * min(round_[0] for round_ in rounds) < min(round_[1] for round_ in rounds)


def _multiply(dtype: torch.dtype) -> Callable[[], object]:
    x, w = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    return lambda: torch.nn.functional.linear(x, w)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
