"""The torch sampler beside vLLM for CPUs, both with 4 LoRA adapters on the same bf16 model, one thread each.

vLLM lives in an environment of its own (``make vllm-env``), in which this file is run with ``--draw``; the two take
turns. It computes in bf16, and where ours prefers fp32 in that as well: the better of its speeds counts. Where that
environment is missing, the table says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

NEW = 64
TURNS = 3
ADAPTERS, RANK = 4, 16
PYTHON = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all of its work in one process, whose CPU time is read
}


def measure() -> list[Any]:
    import statistics
    import tempfile
    from dataclasses import replace

    import torch
    from baselines import write_adapters
    from common import Row, held
    from decode import Ours, prompts_for, speed_of
    from shapes import TINY

    if not (PYTHON.parents[1] / "ready").exists():
        return [Row("64 sequences over 4 adapters, over vLLM for CPUs", "not measured: make vllm-env")]
    torch.set_num_threads(1)
    shape = replace(TINY, name="tiny-bf16", dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        model = shape.write(Path(scratch))
        adapters = write_adapters(Path(scratch) / "lora", model, ADAPTERS, RANK)
        prompts, ours = prompts_for(shape), Ours(model, adapters)
        ours.draw(prompts, 2)
        dtypes = {str(dtype).removeprefix("torch.") for dtype in (shape.dtype, ours.sampler.base.dtype)}
        with contextlib.ExitStack() as stack:
            lists = [prompt.tolist() for prompt in prompts]
            theirs = [stack.enter_context(Theirs(model, adapters, lists, dtype)) for dtype in dtypes]
            for each in theirs:
                each.speed()
            pairs = [
                (speed_of(lambda: ours.draw(prompts, NEW)), max(each.speed() for each in theirs))
                for _ in range(TURNS)
            ]
    speeds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return [held("vllm", statistics.median(a / b for a, b in pairs), f" ({speeds[0]:.0f} / {speeds[1]:.0f})")]


class Theirs:
    """vLLM in its own process: a line in, tokens per CPU-second out."""

    def __init__(self, model: Path, adapters: list[Path], prompts: list[list[int]], dtype: str) -> None:
        command = [str(PYTHON), __file__, "--draw", dtype, str(model), *map(str, adapters)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._tell(json.dumps(prompts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def speed(self) -> float:
        self._tell("")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("speed "):
                return float(line.split()[1])
        raise SystemExit("vLLM ended without an answer")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def draw(dtype: str, model: str, adapters: list[str]) -> None:
    """In vLLM's environment: answer every line of the standard input with a speed."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    torch.set_num_threads(1)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.stdin.readline())]
    loras = [
        LoRARequest(f"a{i * len(adapters) // len(prompts)}", 1 + i * len(adapters) // len(prompts), path)
        for i, path in enumerate(adapters[i * len(adapters) // len(prompts)] for i in range(len(prompts)))
    ]
    engine = LLM(
        model,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=RANK,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=len(prompts),
        dtype=dtype,
    )
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False)
    for _ in sys.stdin:
        began = time.process_time()
        answers = engine.generate(prompts, params, lora_request=loras, use_tqdm=False)
        drawn = sum(len(answer.outputs[0].token_ids) for answer in answers)
        print(f"speed {drawn / (time.process_time() - began)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--draw"]:
        draw(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        from common import show

        sys.exit(not show(measure()))
