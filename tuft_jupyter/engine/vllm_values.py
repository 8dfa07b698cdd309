"""Requests as vLLM wants them, and its answers as the protocol wants them.

Values only; vLLM is imported with the first call. Shapes: P positions of the prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tuft_jupyter.core.engine import Listener
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import (
    NO_TOKEN,
    Drawn,
    FloatArray,
    Int32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
)
from tuft_jupyter.engine.sample_job import DIVERGED


def asked(request: SampleRequest, longest: int) -> dict[str, Any]:
    """What vLLM is to draw, at most ``longest`` tokens each, in the words of its SamplingParams and of its HTTP API."""
    given = request.params
    scored = request.prompt_logprobs or request.topk_prompt_logprobs
    return {
        "n": _drawn(request),
        "temperature": given.temperature,
        "top_k": max(given.top_k, 0),
        "top_p": given.top_p,
        "seed": None if given.seed is None else _spread(given.seed),
        "max_tokens": longest,
        "stop": list(given.stop_strings) or None,
        "include_stop_str_in_output": True,
        "stop_token_ids": list(given.stop_tokens or ()) or None,
        "ignore_eos": given.stop_tokens is not None,
        "skip_special_tokens": False,
        "logprobs": request.topk_sample_logprobs,
        "prompt_logprobs": request.topk_prompt_logprobs if scored else None,
    }


def params(request: SampleRequest, longest: int, *, stream: bool = False) -> Any:
    """The same as vLLM's SamplingParams; its outputs are deltas, with ``stream`` as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **asked(request, longest),
        detokenize=bool(request.params.stop_strings),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def _drawn(request: SampleRequest) -> int:
    """vLLM draws greedily only once: all samples are the same."""
    return 1 if request.params.temperature == 0 else request.num_samples


def _spread(seed: int) -> int:
    """A seed for vLLM, which adds the number of the sample to it: neighbouring seeds must not share samples."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest())


class Answer:
    """Puts vLLM's outputs together. ``on_token`` is called with every token."""

    def __init__(self, request: SampleRequest, on_token: Listener | None = None) -> None:
        self._request, self._on_token = request, on_token
        self._tokens: list[list[Drawn]] = [[] for _ in range(_drawn(request))]
        self._prompt: Any = None

    def add(self, output: Any) -> None:
        """One output, with what is new in it. UserError if the weights have diverged."""
        self._prompt = output.prompt_logprobs or self._prompt
        k = self._request.topk_sample_logprobs
        for part in output.outputs:
            for position, token in enumerate(part.token_ids):
                cell = part.logprobs[position]
                if not math.isfinite(cell[token].logprob):
                    raise UserError(DIVERGED)
                last = part.finish_reason is not None and position == len(part.token_ids) - 1
                reason = StopReason.STOP if part.finish_reason == "stop" else StopReason.LENGTH
                drawn = Drawn(
                    part.index, token, cell[token].logprob, _best(cell, k), reason if last else None
                )
                self._tokens[part.index].append(drawn)
                if self._on_token is not None:
                    for copy in range(self._copies):
                        self._on_token(replace(drawn, index=part.index + copy))

    def result(self) -> SampleResult:
        """Of a request that has ended."""
        request, k = self._request, self._request.topk_sample_logprobs
        sequences = []
        for drawn in self._tokens:
            top = _top([each.top for each in drawn], k) if k else (None, None)
            tokens = np.array([each.token for each in drawn], np.int32)
            logprobs = np.array([each.logprob for each in drawn], np.float32)
            sequences.append(
                SampledSequence(tokens, logprobs, drawn[-1].stop_reason or StopReason.LENGTH, *top)
            )
        scored, top = None, (None, None)
        last = len(request.prompt) - 1
        first = last - (request.prompt_logprobs_last_n or last)
        cells = [None if i <= first else cell for i, cell in enumerate(self._prompt or ())]
        if request.prompt_logprobs:
            pairs = zip(request.prompt.tolist(), cells, strict=True)
            scored = np.array(
                [math.nan if not cell else cell[token].logprob for token, cell in pairs], np.float32
            )
        if request.topk_prompt_logprobs:
            k = request.topk_prompt_logprobs
            top = _top([_best(cell, k) for cell in cells], k)
        return SampleResult(sequences * self._copies, scored, *top)

    @property
    def _copies(self) -> int:
        return self._request.num_samples // len(self._tokens)


def _best(cell: Any, k: int) -> list[tuple[int, float]]:
    """The k likeliest (token, logprob) of a place, best first."""
    ranked = sorted((cell or {}).items(), key=lambda pair: pair[1].rank)[:k]
    return [(token, max(found.logprob, NO_TOKEN)) for token, found in ranked]


def _top(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> tuple[Int32Array, FloatArray]:
    """Ids [P, k] and log-probabilities [P, k]."""
    ids, logprobs = np.zeros((len(rows), k), np.int32), np.full((len(rows), k), NO_TOKEN, np.float32)
    for row, best in enumerate(rows):
        for column, (token, logprob) in enumerate(best):
            ids[row, column], logprobs[row, column] = token, logprob
    return ids, logprobs
