"""Sample requests, and the answers of a sampler to several that are all there at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tuft_jupyter.core.engine import Sampler
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import SampleRequest, SampleResult, SamplingParams


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 259, length).astype(np.int32)


def ask(tokens: np.ndarray, n: int = 1, **params: Any) -> SampleRequest:
    fields = {
        name: params.pop(name)
        for name in ("prompt_logprobs", "topk_prompt_logprobs", "topk_sample_logprobs")
        if name in params
    }
    params = {"max_tokens": 12, "stop_tokens": (), **params}
    return SampleRequest(tokens, n, SamplingParams(**params), **fields)


def drain(sampler: Sampler) -> dict[str, SampleResult | TuftError]:
    answers: dict[str, SampleResult | TuftError] = {}
    while sampler.busy():
        answers.update(sampler.step())
    return answers


def run(sampler: Sampler, jobs: Iterable[tuple[Path | None, SampleRequest]]) -> list[Any]:
    """The answers to requests that are all there at once."""
    count = 0
    for adapter, request in jobs:
        sampler.submit(str(count), adapter, request)
        count += 1
    answers = drain(sampler)
    return [answers[str(i)] for i in range(count)]


def tokens_of(result: SampleResult) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in result.sequences]
