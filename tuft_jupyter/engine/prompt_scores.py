"""What a request wants to know of its prompt, from the logits of one prefill.

Log-probabilities are those of the model itself (temperature 1, no filters); alternatives are drawn at the request's
temperature, without filters (protocol section 2.10). Logits are asked for some positions at a time, and only for those
that somebody wants.

Shapes: P tokens of the prompt, M positions at a time, V vocabulary, k likeliest or drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tuft_jupyter.core.types import SampleRequest, SampleResult, TargetIds
from tuft_jupyter.engine.sampling import generator, invert

_AT_ONCE = 512  # positions
_DRAWN_AT_ONCE = 1 << 14  # tokens: each takes a few kilobytes while it is looked for
_NOTHING = -99999.0  # the protocol's logprob of a cell that holds no token
_ALTERNATIVES = 1 << 32  # the number of their random stream, beyond those of samples


class PromptScores:
    """What a request asked for, gathered while its prompt is run piece by piece, in order.

    Nothing predicts the first token: its log-probability is NaN, its cells hold id 0.
    """

    def __init__(self, request: SampleRequest) -> None:
        self._last = len(request.prompt) - 1  # what is predicted after the last position is a sample
        own = self._last - (request.prompt_logprobs_last_n or self._last)
        firsts = []
        if request.prompt_logprobs or request.topk_prompt_logprobs:
            firsts.append(own)
        if request.targets is not None:
            firsts.append(int(request.targets.rows[request.targets.ids >= 0].min()))
        if request.prompt_alt_tokens_k:
            firsts.append(0)
        self.asked = bool(firsts)
        self._first = min(firsts, default=self._last)
        self._kinds = _kinds(request, own) if firsts else []

    def update(self, start: int, end: int, logits: Callable[[int, int], Tensor]) -> None:
        """Positions [start, end) were run; ``logits(start, end)`` are those that follow such positions, [M, V]."""
        end = min(end, self._last)
        for at in range(max(start, self._first), end, _AT_ONCE):
            until = min(at + _AT_ONCE, end)
            logp_MV = torch.log_softmax(logits(at, until), -1, dtype=torch.float32)
            for kind in self._kinds:
                kind.update(at, until, logp_MV)

    def result(self) -> SampleResult:
        """All of it, and no sequences."""
        result = SampleResult(())
        for kind in self._kinds:
            result = kind.fill(result)
        return result


def _kinds(request: SampleRequest, own: int) -> list[_Own | _Likeliest | _Targets | _Alternatives]:
    kinds: list[_Own | _Likeliest | _Targets | _Alternatives] = []
    if request.prompt_logprobs:
        kinds.append(_Own(request, own))
    if request.topk_prompt_logprobs:
        kinds.append(_Likeliest(request, own))
    if request.targets is not None:
        kinds.append(_Targets(request.targets))
    if request.prompt_alt_tokens_k:
        kinds.append(_Alternatives(request))
    return kinds


class _Own:
    """The prompt's own tokens."""

    def __init__(self, request: SampleRequest, first: int) -> None:
        self._prompt, self._first = request.prompt, first
        self._logprobs = np.full(len(request.prompt), np.nan, np.float32)

    def update(self, start: int, end: int, logp_MV: Tensor) -> None:
        skip = max(self._first - start, 0)
        next_M = torch.from_numpy(self._prompt[start + skip + 1 : end + 1]).to(logp_MV.device, torch.int64)
        found_M1 = logp_MV[skip:].gather(1, next_M[:, None])
        self._logprobs[start + skip + 1 : end + 1] = found_M1[:, 0].cpu()

    def fill(self, result: SampleResult) -> SampleResult:
        return replace(result, prompt_logprobs=self._logprobs)


class _Likeliest:
    """The k likeliest tokens in place of each."""

    def __init__(self, request: SampleRequest, first: int) -> None:
        shape = len(request.prompt), request.topk_prompt_logprobs
        self._first = first
        self._ids, self._logprobs = np.zeros(shape, np.int32), np.full(shape, _NOTHING, np.float32)

    def update(self, start: int, end: int, logp_MV: Tensor) -> None:
        skip = max(self._first - start, 0)
        top_MK, ids_MK = logp_MV[skip:].topk(self._ids.shape[1], dim=1)
        self._ids[start + skip + 1 : end + 1] = ids_MK.cpu()
        self._logprobs[start + skip + 1 : end + 1] = top_MK.cpu()

    def fill(self, result: SampleResult) -> SampleResult:
        return replace(result, topk_prompt_ids=self._ids, topk_prompt_logprobs=self._logprobs)


class _Targets:
    """Tokens that the request names, cell by cell."""

    def __init__(self, targets: TargetIds) -> None:
        self._targets = targets
        self._logprobs = np.zeros(len(targets.ids), np.float32)

    def update(self, start: int, end: int, logp_MV: Tensor) -> None:
        rows, ids = self._targets.rows, self._targets.ids
        cells = np.flatnonzero((rows >= start) & (rows < end) & (ids >= 0))
        at_C = torch.from_numpy(rows[cells] - start).to(logp_MV.device)
        self._logprobs[cells] = logp_MV[at_C, torch.from_numpy(ids[cells]).to(logp_MV.device)].cpu()

    def fill(self, result: SampleResult) -> SampleResult:
        return replace(result, targets=self._targets, target_prompt_logprobs=self._logprobs)


class _Alternatives:
    """Draws in place of each token, independent of one another and of the samples."""

    def __init__(self, request: SampleRequest) -> None:
        shape = len(request.prompt) - 1, request.prompt_alt_tokens_k
        self._temperature = request.params.temperature
        self._rng = generator(request.params.seed, _ALTERNATIVES)
        self._tokens, self._logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)

    def update(self, start: int, end: int, logp_MV: Tensor) -> None:
        step = max(1, _DRAWN_AT_ONCE // self._tokens.shape[1])
        for at in range(start, end, step):
            until = min(at + step, end)
            self._draw(at, until, logp_MV[at - start : until - start])

    def _draw(self, start: int, end: int, logp_MV: Tensor) -> None:
        k = self._tokens.shape[1]
        if self._temperature == 0:
            tokens_MK = logp_MV.argmax(-1, keepdim=True).expand(-1, k)
        else:
            uniforms_MK = torch.from_numpy(self._rng.random((end - start, k))).to(logp_MV.device)
            tokens_MK = invert(torch.softmax(logp_MV / self._temperature, -1), uniforms_MK)
        self._tokens[start:end] = tokens_MK.cpu()
        self._logprobs[start:end] = logp_MV.gather(1, tokens_MK).cpu()

    def fill(self, result: SampleResult) -> SampleResult:
        return replace(result, alt_tokens=self._tokens, alt_logprobs=self._logprobs)
