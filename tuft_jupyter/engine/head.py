"""The unembedding of packed rows: logits of chosen positions, and log-probabilities with their losses.

:func:`run` never holds logits of more than a chunk of positions. What a chunk's logits say of the targets is kept,
the loss says its slope in that, and the same memory becomes the gradient that goes back into the hidden
states and into the adapters of the unembedding. Positions that the loss leaves out cost the forward half
only.

Shapes: N positions of the row, M of a chunk, D hidden size, V vocabulary, K targets per position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tuft_jupyter.engine import frozen
from tuft_jupyter.engine.frozen import Frozen
from tuft_jupyter.engine.lora import MultiLoraLinear
from tuft_jupyter.engine.losses import Config, Inputs, Loss
from tuft_jupyter.engine.low_rank import Part, add_updates, pull_updates, take
from tuft_jupyter.engine.packing import Segment

_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}  # logits held at once
Rows = NDArray[np.int64]
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


@dataclass(frozen=True, slots=True)
class Readout:
    """What a family makes of its unembedding's products x: ``scale`` times them, of which ``softcap`` C makes
    C * tanh(x / C). Granite and Cohere scale, Gemma 2 bends.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z_MV: Tensor) -> Tensor:
        """Logits of products, which are overwritten; in fp32 where anything is made of them."""
        if self == PLAIN:
            return z_MV
        z_MV = z_MV.float().mul_(self.scale)
        return z_MV if self.softcap is None else z_MV.div_(self.softcap).tanh_().mul_(self.softcap)

    def pull(self, dz_MV: Tensor, z_MV: Tensor | None) -> Tensor:
        """The gradient in the products, in the place of that in the logits ``z_MV``, which are overwritten.

        They are only needed where they were bent.
        """
        if self.softcap is not None and z_MV is not None:
            dz_MV.mul_(z_MV.div_(self.softcap).square_().neg_().add_(1))
        return dz_MV if self.scale == 1 else dz_MV.mul_(self.scale)


PLAIN = Readout()


@dataclass(slots=True)
class SpanResult:
    """Log-probabilities of the targets, the loss of each, and its slope; all fp32, shaped as the targets."""

    logprobs: Tensor
    losses: Tensor
    slopes: Tensor


def logits(lm_head: nn.Module, readout: Readout, h_MD: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Logits [M, V] of hidden states; ``segments`` are of these M positions. In the model's dtype if they are plain."""
    base = _base(lm_head)
    z_MV = base(h_MD)
    add_updates(h_MD, _parts(lm_head, segments), z_MV)
    return readout(z_MV)


def run(
    lm_head: nn.Module,
    readout: Readout,
    h_ND: Tensor,
    segments: Sequence[Segment],
    spans: Sequence[Span],
    *,
    backward: bool,
) -> tuple[list[SpanResult], Tensor | None]:
    """The losses of all spans and, with ``backward``, the gradient [N, D] of their sum in ``h_ND``.

    ``spans`` are in order and cover the row. Gradients of adapters on the unembedding itself go to their
    slots.
    """
    with torch.no_grad():
        work = _Pass(_base(lm_head), readout, _parts(lm_head, segments), h_ND.detach(), spans)
        dh_ND = torch.empty_like(work.h_ND) if backward else None
        work.run(dh_ND)
        return work.results, dh_ND


def _base(lm_head: nn.Module) -> Frozen:
    return frozen.of(lm_head.base_layer if isinstance(lm_head, MultiLoraLinear) else lm_head)


def _parts(lm_head: nn.Module, segments: Sequence[Segment]) -> list[Part]:
    return lm_head.parts(tuple(segments)) if isinstance(lm_head, MultiLoraLinear) else []


class _Pass:
    """One row on its way through the unembedding, chunk by chunk; a chunk is some of its positions, in order."""

    def __init__(
        self, base: Frozen, readout: Readout, parts: list[Part], h_ND: Tensor, spans: Sequence[Span]
    ) -> None:
        self.base, self.readout, self.parts, self.h_ND, self.spans = base, readout, parts, h_ND, spans
        self.size = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS[h_ND.device.type] // base.weight.shape[0])
        self.counts = np.concatenate([span.counts for span in spans])
        self.results = [
            SpanResult(*(torch.empty(span.targets.shape, device=h_ND.device) for _ in range(3)))
            for span in spans
        ]
        for span, result in zip(spans, self.results, strict=True):
            if span.loss.whole_sequences:
                self._whole(span, result)

    def run(self, dh_ND: Tensor | None) -> None:
        """Fill the results and, if given, the gradient. Positions that count have chunks of their own."""
        if dh_ND is not None and not self.counts.all():
            dh_ND.zero_()
        for counting in (True, False):
            for rows in self._chunks(np.flatnonzero(self.counts == counting)):
                self._chunk(rows, dh_ND if counting else None)

    def _chunks(self, rows: Rows) -> Iterator[Rows]:
        for at in range(0, len(rows), self.size):
            chunk = rows[at : at + self.size]
            most = len(chunk) - len(chunk) % frozen.STEP  # a number of rows that need not be filled up
            yield from (part for part in (chunk[:most], chunk[most:]) if len(part))

    def _chunk(self, rows: Rows, dh_ND: Tensor | None) -> None:
        h_MD = _at(self.h_ND, rows)
        z_MV = self._logits(h_MD, rows).float()
        p_MV = torch.softmax(z_MV, -1)
        normalizer_M = z_MV.amax(1) - p_MV.amax(1).log()
        spans = list(self._spans_in(rows))
        chosen = [_gather(z_MV[here], _at(span.targets, there)) for span, _, here, there in spans]
        bent_MV = None if dh_ND is None or self.readout.softcap is None else z_MV
        del z_MV
        for (span, result, here, there), logp in zip(spans, chosen, strict=True):
            targets, to = _at(span.targets, there), _index(there, self.h_ND.device)
            if not span.loss.whole_sequences:
                logp -= normalizer_M[here].view(-1, *(1,) * (logp.dim() - 1))
                inputs = {name: _at(value, there) for name, value in span.inputs.items()}
                result.logprobs[to] = logp
                result.losses[to], result.slopes[to] = span.loss.formula(logp, inputs, span.config)
            if dh_ND is not None:
                slopes = _at(result.slopes, there).view(len(there), -1)
                # d/dz of sum_k slope_k log_softmax(z)[target_k]
                dz_MV = p_MV[here].mul_(-slopes.sum(1, keepdim=True))
                dz_MV.scatter_add_(1, targets.view(len(there), -1), slopes)
        if dh_ND is not None:
            if self.readout != PLAIN:
                p_MV = self.readout.pull(p_MV, bent_MV)
            dz_MV = p_MV.to(h_MD.dtype)
            out_MD = self.base.pull(dz_MV)
            parts = self._parts_in(rows)
            hidden = [torch.mm(take(h_MD, a, b), slot.a.t()) for a, b, slot in parts]
            pull_updates(dz_MV, h_MD, parts, hidden, out_MD)
            dh_ND[_index(rows, dh_ND.device)] = out_MD

    def _whole(self, span: Span, result: SpanResult) -> None:
        """A loss over whole datums needs all their log-probabilities before it can say any slope."""
        for rows in self._chunks(np.arange(span.start, span.end)):
            logp_MV = F.log_softmax(self._logits(_at(self.h_ND, rows), rows), dim=-1, dtype=torch.float32)
            at = slice(rows[0] - span.start, rows[-1] + 1 - span.start)
            result.logprobs[at] = _gather(logp_MV, span.targets[at])
        for start, end in pairwise(edge - span.start for edge in span.cu):
            at = slice(start, end)
            inputs = span.inputs
            if span.loss.program is None:
                inputs = {name: value[at] for name, value in inputs.items()}
            result.losses[at], result.slopes[at] = span.loss.formula(result.logprobs[at], inputs, span.config)

    def _logits(self, h_MD: Tensor, rows: Rows) -> Tensor:
        z_MV = self.base(h_MD)
        add_updates(h_MD, self._parts_in(rows), z_MV)
        return self.readout(z_MV)

    def _parts_in(self, rows: Rows) -> list[Part]:
        found = []
        for start, end, slot in self.parts:
            first, last = np.searchsorted(rows, (start, end)).tolist()
            if first < last:
                found.append((first, last, slot))
        return found

    def _spans_in(self, rows: Rows) -> Iterator[tuple[Span, SpanResult, slice, Rows]]:
        """The spans that these positions are in: which of the chunk's rows, and which positions of the span."""
        for span, result in zip(self.spans, self.results, strict=True):
            first, last = np.searchsorted(rows, (span.start, span.end)).tolist()
            if first < last:
                yield span, result, slice(first, last), rows[first:last] - span.start


def _index(rows: Rows, device: torch.device) -> slice | Tensor:
    """What to index with for these rows: a slice where they are neighbours, so that nothing is copied."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def _at(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[_index(rows, tensor.device)]


def _gather(z_MV: Tensor, targets: Tensor) -> Tensor:
    return z_MV.gather(1, targets.view(len(targets), -1)).view(targets.shape)
