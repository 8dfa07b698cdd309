"""From an optimizer step to the first token of its weights: how long new weights take to be heard.

Through the whole server (SDK, Jupyter, Ray, two workers, files), and in the engine alone: trainer and sampler in one
process. Another tenant samples all the while in a second measurement: it must not be held up.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MODEL,
    RANK,
    Row,
    SdkLoop,
    at_most,
    held,
    in_a_process,
    median_ms,
    owners_client,
    server,
    show,
    spare,
    tokens_of,
)

ROUNDS, WARM = 20, 4
PROMPT = list(range(3, 19))
MARK_MS = 50.0


def measure() -> list[Row]:
    rows = in_a_process(engine)
    with server() as started, owners_client(started) as client:
        loop = SdkLoop(client, tokens_of(1, 16))
        rounds(loop)  # both workers are up, and hold as many adapters as they do
        spare(started)
        alone = median_ms(rounds(loop))
        other = client.create_sampling_client(base_model=MODEL).result()
        gaps = Others(other)
        quiet = gaps.watch(lambda: time.sleep(2.0))
        busy = gaps.watch(lambda: rounds(loop))
    return [
        *rows,
        held("hand-over", alone),
        Row("another tenant's token meanwhile, median", f"{busy:.1f} ms (alone {quiet:.1f} ms)"),
    ]


def rounds(loop: SdkLoop) -> list[float]:
    """Seconds from the end of an optimizer step to the first token, of each round after the warm-up."""
    seconds = []
    for _ in range(WARM + ROUNDS):
        loop.step()
        began = time.perf_counter()
        one_token(loop.training.save_weights_and_get_sampling_client().result())
        seconds.append(time.perf_counter() - began)
    return seconds[WARM:]


def one_token(client: Any) -> None:
    from tinker import types

    params = types.SamplingParams(max_tokens=1, temperature=0.0)
    client.sample(types.ModelInput.from_ints(PROMPT), 1, params).result()


class Others:
    """A tenant that asks for one token after the other."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def watch(self, work: Any) -> float:
        """Median milliseconds of its requests while ``work`` is done."""
        seconds: list[float] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                began = time.perf_counter()
                one_token(self._client)
                seconds.append(time.perf_counter() - began)

        asking = threading.Thread(target=ask)
        asking.start()
        work()
        done.set()
        asking.join()
        return median_ms(seconds)


def engine() -> list[Row]:
    """Saved to files by the trainer, verified and loaded by the sampler, without any server."""
    from tuft_jupyter import models
    from tuft_jupyter.core.types import LoraSpec, SampleRequest, SamplingParams
    from tuft_jupyter.engine.torch_sampler import TorchSampler
    from tuft_jupyter.engine.trainer import PeftTrainer

    torch.set_num_threads(1)
    path = models.resolve(MODEL).path
    trainer = PeftTrainer(path, dtype=torch.float32)
    sampler = TorchSampler(path, dtype=torch.float32)
    trainer.create("run", LoraSpec(rank=RANK, alpha=2 * RANK, seed=1))
    request = SampleRequest(np.array(PROMPT, np.int32), 1, SamplingParams(max_tokens=1, temperature=0.0))
    seconds = []
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        for i in range(WARM + ROUNDS):
            began = time.perf_counter()
            trainer.save("run", Path(scratch) / str(i), optimizer=False, durable=False)
            sampler.submit(str(i), Path(scratch) / str(i), request)
            while sampler.busy():
                sampler.step()
            seconds.append(time.perf_counter() - began)
    return [at_most("the same in the engine alone, median", median_ms(seconds[WARM:]), MARK_MS, " ms")]


if __name__ == "__main__":
    sys.exit(not show(measure()))
