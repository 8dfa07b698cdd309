"""The engine on one GPU: random weights in true shapes, no server, no Ray. ``python benchmarks/gpu.py``.

Three measurements, each against its mark for one H200: trained tokens per second of 16 tenants on Qwen3-8B, 16 tenants
on Qwen3-0.6B beside sequential PEFT, and decoding 256 sequences on Qwen3-8B with vLLM where that is installed, else
with the torch sampler. ``--tiny`` runs the same code with small shapes, on any machine; its figures say nothing.
The 8B model takes 17 GB in ``--scratch`` (default: a temporary directory).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from baselines import SequentialPeft, write_adapters
from decode import Ours
from shapes import Shape, batches, tokens_in
from table import Row, at_least, show
from tenants import Tenants

QWEN3_8B = Shape("qwen3-8b", 36, 4096, 12288, (32, 8), 151936, torch.bfloat16, head_size=128, tied=False)
QWEN3_06B = Shape("qwen3-0.6b", 28, 1024, 3072, (16, 8), 151936, torch.bfloat16, head_size=128)
TINY = Shape("tiny", 2, 64, 128, (4, 2), 256, torch.float32, head_size=16)


@dataclass(frozen=True, slots=True)
class Load:
    """How much of everything; ``rows`` and ``short`` are tokens of a tenant's one row."""

    large: Shape
    small: Shape
    tenants: int
    rank: int
    rows: int
    short: int
    steps: int
    sequences: int
    new: int


FULL = Load(QWEN3_8B, QWEN3_06B, 16, 32, 2048, 500, 5, 256, 128)
SMALLEST = Load(TINY, TINY, 2, 4, 24, 10, 1, 6, 4)


def measure(load: Load, scratch: Path) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = train_large(load, load.large.write(scratch, device), device)
    _release()
    rows += train_small(load, load.small.write(scratch, device), device)
    _release()
    rows += decode(load, load.large.write(scratch, device), scratch, device)
    return rows


def train_large(load: Load, model: Path, device: str) -> list[Row]:
    ours = Tenants(model, load.tenants, rank=load.rank, device=device)
    requests = batches(load.large, load.tenants, 1, (load.rows, load.rows))
    ours.step(requests)  # warm
    seconds = timed(lambda: ours.step(requests), load.steps)
    what = f"{load.large.name}, {load.tenants} tenants x 1 row of {load.rows}, rank {load.rank}"
    return [at_least(f"{what}: trained", tokens_in(requests) / seconds, 13_000, " tokens/s"), *peak()]


def train_small(load: Load, model: Path, device: str) -> list[Row]:
    requests = batches(load.small, load.tenants, 1, (load.short, load.short))
    ours = Tenants(model, load.tenants, rank=load.rank, device=device)
    theirs = SequentialPeft(model, load.tenants, rank=load.rank, device=device)
    a, b = ours.step(requests), theirs.step(requests)
    if abs(a - b) > 2e-2 * abs(b):
        raise RuntimeError(f"the loops differ: PEFT's loss {b:.4f}, ours {a:.4f}")
    pairs = [
        (timed(lambda: theirs.step(requests), 1), timed(lambda: ours.step(requests), 1))
        for _ in range(load.steps)
    ]
    ratio = float(np.median([slow / fast for slow, fast in pairs]))
    what = f"{load.small.name}, {load.tenants} tenants x {load.short} tokens"
    return [at_least(f"{what}: over sequential PEFT", ratio, 5, " x")]


def decode(load: Load, model: Path, scratch: Path, device: str) -> list[Row]:
    what = f"{load.large.name}, {load.sequences} sequences x {load.new} new tokens"
    if device == "cuda" and importlib.util.find_spec("vllm") is not None:
        return [at_least(f"{what}: vLLM", with_vllm(load, model), 10_000, " tokens/s")]
    adapters = write_adapters(scratch / "lora", model, min(4, load.tenants), load.rank)
    ours = Ours(model, adapters, live=load.sequences)
    prompts = prompts_of(load)
    ours.draw(prompts[:2], 2)
    drawn = load.sequences * load.new
    speed = drawn / timed(lambda: ours.draw(prompts, load.new), 1)
    return [Row(f"{what}: torch sampler, {len(adapters)} adapters", f"{speed:.0f} tokens/s"), *peak()]


def with_vllm(load: Load, model: Path) -> float:
    """Tokens per second."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=load.sequences,
        dtype="bfloat16",
    )
    params = SamplingParams(max_tokens=load.new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts_of(load)]
    engine.generate(prompts[:2], params, use_tqdm=False)
    return load.sequences * load.new / timed(lambda: engine.generate(prompts, params, use_tqdm=False), 1)


def prompts_of(load: Load) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, load.large.vocab, 16 + i % 48).astype(np.int32) for i in range(load.sequences)]


def timed(work: Callable[[], object], times: int) -> float:
    """Seconds of one, the device's own work included."""
    _wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait()
    return (time.perf_counter() - began) / times


def peak() -> list[Row]:
    if not torch.cuda.is_available():
        return []
    return [Row("  peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main(arguments: list[str]) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on any machine")
    parser.add_argument("--scratch", type=Path, help="where models are written, and kept")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs the same code with small shapes")
    load = SMALLEST if options.tiny else FULL
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
        return measure(load, options.scratch)
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        return measure(load, Path(scratch))


if __name__ == "__main__":
    sys.exit(not show(main(sys.argv[1:])))
