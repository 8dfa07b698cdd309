"""Several adapters of one geometry in the same layers, as two batched matmuls instead of two per adapter.

For decoding, where each adapter has only a few rows: a matmul over few rows costs what it takes to begin it, and
sixteen of them cost sixteen times that. Weights are copied together once, for as long as the same adapters decode
together. Only for reading: adapters that are trained have their gradients in their own matmuls.

Shapes: N rows, T adapters of W rows each (the fewer ones repeat a row), I inputs, O outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tuft_jupyter.engine.packing import Segment

_WIDEST = 64  # rows of one adapter: from there on a matmul of its own pays


class Rows:
    """Where the rows of each adapter are in a row of tokens whose bare ones come first."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        spans = [range(start, end) for start, end, _ in segments]
        self.first, self.count = spans[0].start, len(spans)
        self.width = max(len(span) for span in spans)
        self.even = all(len(span) == self.width for span in spans)
        padded = [[*span] + [span.start] * (self.width - len(span)) for span in spans]
        self._padded = torch.tensor([row - self.first for row in chain(*padded)], device=device)
        places = [i * self.width + at for i, span in enumerate(spans) for at in range(len(span))]
        self._places = torch.tensor(places, device=device)

    def spread(self, x_NI: Tensor, *, zeros: bool = False) -> Tensor:
        """The rows by adapter, [T, W, I]; what is added to the shorter is anything, or ``zeros``."""
        if self.even:
            return x_NI.unflatten(0, (self.count, self.width))
        if zeros:
            x = x_NI.new_zeros(self.count * self.width, x_NI.shape[1]).index_copy_(0, self._places, x_NI)
        else:
            x = x_NI.index_select(0, self._padded)
        return x.view(self.count, self.width, -1)

    def gather(self, y_TWO: Tensor) -> Tensor:
        """The other way, [N, O]."""
        y = y_TWO.flatten(0, 1)
        return y if self.even else y.index_select(0, self._places)


def rows_of(segments: Sequence[Segment], device: torch.device) -> Rows | None:
    """How a row can be spread over its adapters; None if matmuls one by one are no worse."""
    adapted = [segment for segment in segments if segment[2] is not None]
    if len(adapted) < 2 or len({name for _, _, name in adapted}) < len(adapted):
        return None
    tokens = adapted[-1][1] - adapted[0][0]
    widest = max(end - start for start, end, _ in adapted)
    if widest > _WIDEST or widest * len(adapted) > 2 * tokens or segments[-len(adapted) :] != tuple(adapted):
        return None
    return Rows(adapted, device)


class SideBySide:
    """``a`` [T, I, R] and ``bs`` [T, r, O'] of each layer, which reads ``hidden`` and writes ``columns``."""

    def __init__(
        self, a_TRI: Sequence[Tensor], bs: Sequence[tuple[Sequence[Tensor], slice, slice]], scale: float
    ) -> None:
        self._a_TIR = torch.stack(list(a_TRI)).transpose(1, 2)
        self._bs = [(torch.stack(list(b)).transpose(1, 2), hidden, columns) for b, hidden, columns in bs]
        self._scale = scale

    def update(self, rows: Rows, x_NI: Tensor, y_NO: Tensor) -> None:
        """``y += scale * (x A^T) B^T`` in place, each row with its own adapter's."""
        h_TWR = torch.bmm(rows.spread(x_NI), self._a_TIR)
        for b_TRO, hidden, columns in self._bs:
            update = rows.gather(torch.bmm(h_TWR[:, :, hidden], b_TRO))
            y_NO[:, columns].add_(update, alpha=self._scale)
