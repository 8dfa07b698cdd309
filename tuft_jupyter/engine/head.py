"""The unembedding of packed rows: logits of chosen positions, and log-probabilities with their losses.

:func:`run` never holds logits of more than a chunk of positions. A chunk's logits become log-probabilities,
the loss says its slope in them, and the same memory becomes the gradient that goes back into the hidden
states and into the adapters of the unembedding. Positions that the loss leaves out cost the forward half
only.

Shapes: N positions of the row, M of a chunk, D hidden size, V vocabulary, K targets per position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tuft_jupyter.engine.lora import MultiLoraLinear, Part, add_updates, pull_updates, take
from tuft_jupyter.engine.losses import Config, Inputs, Loss
from tuft_jupyter.engine.packing import Segment

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # logits held at once
_SMALLEST_CHUNK = 64  # positions: below that the matmul is slow


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [``cu[0]``, ``cu[-1]``) of the row: the datums of one request, ``cu`` between them.

    ``targets`` int64 [n] or [n, K]; ``inputs`` fp32 of the same shape (of a loss with a ``program``: on the host, as
    they were given, and of the one datum of this span); ``counts`` (host, [n]) is False where the loss is 0 whatever
    the model says.
    """

    cu: tuple[int, ...]
    targets: Tensor
    inputs: Inputs
    counts: NDArray[np.bool_]
    loss: Loss
    config: Config

    @property
    def start(self) -> int:
        return self.cu[0]

    @property
    def end(self) -> int:
        return self.cu[-1]


@dataclass(slots=True)
class SpanResult:
    """Log-probabilities of the targets, the loss of each, and its slope; all fp32, shaped as the targets."""

    logprobs: Tensor
    losses: Tensor
    slopes: Tensor


def logits(lm_head: nn.Module, h_MD: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Logits [M, V] of hidden states, in the model's dtype; ``segments`` are of these M positions."""
    base = _base(lm_head)
    z_MV = F.linear(h_MD, base.weight, base.bias)
    add_updates(h_MD, _parts(lm_head, segments), z_MV)
    return z_MV


def run(
    lm_head: nn.Module, h_ND: Tensor, segments: Sequence[Segment], spans: Sequence[Span], *, backward: bool
) -> tuple[list[SpanResult], Tensor | None]:
    """The losses of all spans and, with ``backward``, the gradient [N, D] of their sum in ``h_ND``.

    ``spans`` are in order and cover the row. Gradients of adapters on the unembedding itself go to their
    slots.
    """
    with torch.no_grad():
        work = _Pass(_base(lm_head), _parts(lm_head, segments), h_ND.detach(), spans)
        dh_ND = torch.empty_like(work.h_ND) if backward else None
        for start, end in work.chunks(0, len(h_ND)):
            work.chunk(start, end, dh_ND)
        return work.results, dh_ND


def _base(lm_head: nn.Module) -> Any:
    return lm_head.base_layer if isinstance(lm_head, MultiLoraLinear) else lm_head


def _parts(lm_head: nn.Module, segments: Sequence[Segment]) -> list[Part]:
    return lm_head.parts(tuple(segments)) if isinstance(lm_head, MultiLoraLinear) else []


class _Pass:
    """One row on its way through the unembedding, chunk by chunk."""

    def __init__(self, base: Any, parts: list[Part], h_ND: Tensor, spans: Sequence[Span]) -> None:
        self.base, self.parts, self.h_ND, self.spans = base, parts, h_ND, spans
        self.size = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[h_ND.device.type] // base.weight.shape[0])
        self.counts = np.concatenate([span.counts for span in spans])
        self.results = [
            SpanResult(*(torch.empty(span.targets.shape, device=h_ND.device) for _ in range(3)))
            for span in spans
        ]
        for span, result in zip(spans, self.results, strict=True):
            if span.loss.whole_sequences:
                self._whole(span, result)

    def chunks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for at in range(start, end, self.size):
            yield at, min(at + self.size, end)

    def chunk(self, start: int, end: int, dh_ND: Tensor | None) -> None:
        """Fill the results of positions [start, end) and, if given, their gradient."""
        logp_MV = self._logprobs(start, end)
        for span, result, here, there in self._spans_in(start, end):
            if not span.loss.whole_sequences:
                logp = _gather(logp_MV[here], span.targets[there])
                result.logprobs[there] = logp
                inputs = {name: value[there] for name, value in span.inputs.items()}
                result.losses[there], result.slopes[there] = span.loss.formula(logp, inputs, span.config)
        if dh_ND is not None:
            rows = np.flatnonzero(self.counts[start:end])
            if len(rows) < end - start:
                dh_ND[start:end] = 0
            if len(rows):
                self._backward(
                    start, end, rows if len(rows) < end - start else None, logp_MV, dh_ND[start:end]
                )

    def _backward(
        self, start: int, end: int, rows: NDArray[np.int64] | None, logp_MV: Tensor, dh_MD: Tensor
    ) -> None:
        """Turn ``logp_MV`` into dL/dlogits and carry it to ``dh_MD``; only ``rows`` count (None: all)."""
        h_MD, out_MD, index = self.h_ND[start:end], dh_MD, None
        if rows is not None:
            index = torch.from_numpy(rows).to(h_MD.device)
            logp_MV, h_MD, out_MD = logp_MV[index], h_MD[index], dh_MD.new_empty(len(rows), dh_MD.shape[1])
        dz_MV = logp_MV.exp_()
        for span, result, here, there in self._spans_in(start, end):
            first, last = _inside(rows, here.start, here.stop)
            if first == last:
                continue
            slopes, targets = result.slopes[there], span.targets[there]
            if index is not None:
                local = index[first:last] - here.start
                slopes, targets = slopes[local], targets[local]
            slopes, targets = slopes.view(last - first, -1), targets.view(last - first, -1)
            # d/dz of sum_k slope_k log_softmax(z)[target_k]
            take(dz_MV, first, last).mul_(-slopes.sum(1, keepdim=True)).scatter_add_(1, targets, slopes)
        dz_MV = dz_MV.to(h_MD.dtype)
        torch.mm(dz_MV, self.base.weight, out=out_MD)
        parts = [(*_inside(rows, a, b), slot) for a, b, slot in self._parts_in(start, end)]
        hidden = [torch.mm(take(h_MD, a, b), slot.a.t()) for a, b, slot in parts]
        pull_updates(dz_MV, h_MD, parts, hidden, out_MD)
        if index is not None:
            dh_MD[index] = out_MD

    def _whole(self, span: Span, result: SpanResult) -> None:
        """A loss over whole datums needs all their log-probabilities before it can say any slope."""
        for start, end in self.chunks(span.start, span.end):
            at = slice(start - span.start, end - span.start)
            result.logprobs[at] = _gather(self._logprobs(start, end), span.targets[at])
        for start, end in pairwise(edge - span.start for edge in span.cu):
            at = slice(start, end)
            inputs = span.inputs
            if span.loss.program is None:
                inputs = {name: value[at] for name, value in inputs.items()}
            result.losses[at], result.slopes[at] = span.loss.formula(result.logprobs[at], inputs, span.config)

    def _logprobs(self, start: int, end: int) -> Tensor:
        h_MD = self.h_ND[start:end]
        z_MV = F.linear(h_MD, self.base.weight, self.base.bias)
        add_updates(h_MD, self._parts_in(start, end), z_MV)
        return F.log_softmax(z_MV, dim=-1, dtype=torch.float32)

    def _parts_in(self, start: int, end: int) -> list[Part]:
        return [
            (max(a, start) - start, min(b, end) - start, slot)
            for a, b, slot in self.parts
            if a < end and b > start
        ]

    def _spans_in(self, start: int, end: int) -> Iterator[tuple[Span, SpanResult, slice, slice]]:
        """The spans that meet [start, end), with the stretch that does: as rows of the chunk, and of the span."""
        for span, result in zip(self.spans, self.results, strict=True):
            a, b = max(start, span.start), min(end, span.end)
            if a < b:
                yield span, result, slice(a - start, b - start), slice(a - span.start, b - span.start)


def _gather(logp_MV: Tensor, targets: Tensor) -> Tensor:
    return logp_MV.gather(1, targets.view(len(targets), -1)).view(targets.shape)


def _inside(rows: NDArray[np.int64] | None, start: int, end: int) -> tuple[int, int]:
    """Where the sorted ``rows`` (None: all) lie that are in [start, end)."""
    if rows is None:
        return start, end
    first, last = np.searchsorted(rows, (start, end)).tolist()
    return first, last
