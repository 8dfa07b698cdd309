"""What one adapter adds to one matrix, ``y += scale * (x A^T) B^T``, and the gradients of that.

The adapters of a row take turns, each over its own stretch of rows: two thin matmuls each, and gradients that go
straight into the adapter's own accumulator. Knows nothing of layers, models or files.

Shapes: N rows, I inputs, O outputs, R rank.
Reference: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LONG = 128  # rows


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Slot:
    """One adapter in one layer: ``a`` [R, I] and ``b`` [O, R] in the model's dtype.

    ``grad_a`` and ``grad_b`` are where their gradients add up; None if the adapter is only read.
    """

    a: Tensor
    b: Tensor
    scale: float
    grad_a: Tensor | None
    grad_b: Tensor | None

    def add_gradients(self, x_NI: Tensor, h_NR: Tensor, dy_NO: Tensor) -> Tensor:
        """Accumulate dA and dB of ``y += scale * h B^T`` with ``h = x A^T``.

        Returns ``dy B`` [N, R]; the adapter's share of dx is ``scale`` times that times A.
        """
        dh_NR = torch.mm(dy_NO, self.b)
        if self.grad_a is None or self.grad_b is None:
            return dh_NR
        accumulate(self.grad_b, dy_NO.t(), h_NR, self.scale)
        accumulate(self.grad_a, dh_NR.t(), x_NI, self.scale)
        return dh_NR


def accumulate(grad: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``grad += scale * left right``; ``grad`` is fp32, the factors may be half."""
    if len(left) > right.shape[1] and len(right) >= _LONG:
        # A tall, narrow product of many rows: BLAS takes up to twice as long as for its transpose.
        grad.add_(torch.mm(right.t(), left.t()).t(), alpha=scale)
    elif grad.dtype == left.dtype:
        grad.addmm_(left, right, alpha=scale)
    else:
        grad.add_(torch.mm(left, right), alpha=scale)


Part = tuple[int, int, Slot]


def take(x: Tensor, start: int, end: int) -> Tensor:
    """Rows [start, end); a view is only made where it is less than all."""
    return x if start == 0 and end == len(x) else x[start:end]


def add_updates(x_NI: Tensor, parts: list[Part], y_NO: Tensor) -> list[Tensor]:
    """``y += scale * (x A^T) B^T`` for each part's rows, in place; returns each part's ``x A^T``."""
    hidden = []
    for start, end, slot in parts:
        h_NR = torch.mm(take(x_NI, start, end), slot.a.t())
        take(y_NO, start, end).addmm_(h_NR, slot.b.t(), alpha=slot.scale)
        hidden.append(h_NR)
    return hidden


def pull_updates(
    dy_NO: Tensor, x_NI: Tensor, parts: list[Part], hidden: list[Tensor], dx_NI: Tensor | None
) -> None:
    """The way back: gradients of A and B to the parts' slots, the rest added to ``dx_NI`` if that is wanted."""
    for (start, end, slot), h_NR in zip(parts, hidden, strict=True):
        dh_NR = slot.add_gradients(take(x_NI, start, end), h_NR, take(dy_NO, start, end))
        if dx_NI is not None:
            take(dx_NI, start, end).addmm_(dh_NR, slot.a, alpha=slot.scale)
