"""The matrices of a frozen base model, laid out once in the order in which a CPU's kernels read them.

A general matmul brings its weights into that order at every call: for 64 rows a third of its time, for a thousand a
tenth. Frozen weights never change, so oneDNN's kernels are given copies that are in order already: one for the way
forward, another for the way back, each made when it is first needed. Elsewhere (on a GPU, on a CPU without AVX-512,
where the copies would take much of the memory) the same calls are plain matmuls.

A kernel is prepared for each number of rows, and kept: half a millisecond and half a megabyte. So only some numbers are
used (:func:`rounded`): what is between them is filled up with rows of zeros, here or, which is cheaper, by the caller.

Promises: a row's result does not depend on how many rows there are (of two and more).

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEP = 32
"""Larger numbers of rows are multiples of it."""

_DTYPES = (torch.float32, torch.bfloat16)


class Frozen:
    """``x W^T + b`` and the way back for a ``weight`` [O, I] that never changes; ``copies``: memory is no concern."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, copies: bool = False) -> None:
        self.weight, self.bias = weight_OI, bias_O
        self._ordered = (
            copies and weight_OI.device.type == "cpu" and weight_OI.dtype in _DTYPES and has_kernel()
        )
        self._forward: Tensor | None = None
        self._back: Tensor | None = None

    def __call__(self, x_NI: Tensor) -> Tensor:
        if not self._ordered:
            return F.linear(x_NI, self.weight, self.bias)
        if self._forward is None:
            self._forward = _in_order(self.weight)
        return _linear(x_NI, self._forward, self.bias)

    def plus(self, x_NI: Tensor, residual_NO: Tensor) -> Tensor:
        """``x W^T + b + residual``, new memory."""
        if self._ordered or self.bias is not None:
            return self(x_NI).add_(residual_NO)
        return torch.addmm(residual_NO, x_NI, self.weight.t())

    def pull(self, dy_NO: Tensor) -> Tensor:
        """The gradient in x, ``dy W``."""
        if not self._ordered:
            return torch.mm(dy_NO, self.weight)
        if self._back is None:
            self._back = _in_order(self.weight.t().contiguous())
        return _linear(dy_NO, self._back, None)


def rounded(rows: int) -> int:
    """As many rows as are computed where so many are needed."""
    step = STEP if rows > 4 * STEP else STEP // 4
    return rows if rows < step else -(-rows // step) * step


_unembeddings: WeakKeyDictionary[nn.Module, Frozen] = WeakKeyDictionary()


def of(linear: nn.Module, *, copies: bool = False) -> Frozen:
    """That of a module which is called in several places, made by who asks first."""
    found = _unembeddings.get(linear)
    if found is None:
        module: Any = linear
        bias = None if module.bias is None else module.bias.detach()
        found = _unembeddings[linear] = Frozen(module.weight.detach(), bias, copies=copies)
    return found


@cache
def has_kernel() -> bool:
    """Whether this torch and this CPU have the kernel; on CPUs without AVX-512 it was not measured."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def _in_order(weight_OI: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # whoever comes first, others will use it too
        ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return ordered


def _linear(x_NI: Tensor, ordered: Tensor, bias_O: Tensor | None) -> Tensor:
    rows = len(x_NI)
    more = rounded(rows) - rows
    if more:
        x_NI = F.pad(x_NI, (0, 0, 0, more))
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, ordered, bias_O, "none", [], "")
    return y_NO[:rows] if more else y_NO
