"""Training several adapters of one geometry on a GPU: grouped matmuls over a row instead of two per adapter.

A GPU runs sixteen small matmuls one after the other in the time that it takes to launch them; as one grouped matmul
(``torch.nn.functional.grouped_mm``, where it is there and does what it should) they are one launch. Gradients are
batched matmuls over the adapters' rows, padded to the longest. On CPUs matmuls one by one are faster, so there it is
only tested.

Promises the same numbers as :mod:`~tuft_jupyter.engine.linears` gives one adapter after the other, up to rounding.

Shapes: N rows, T adapters of at most W rows each, I inputs, O outputs, R ranks of all layers together, r of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft_jupyter.engine.packing import Segment
from tuft_jupyter.engine.side_by_side import Rows

_MOST = 64  # adapters: their weights are copied together for each row
_ALIGNED = 8  # elements: grouped kernels want rows to begin at 16 bytes
_FUSED = (9, 10)
"""Major compute capabilities with a kernel: elsewhere torch waits for the GPU, then calls one matmul per adapter."""


@dataclass(frozen=True, slots=True)
class Member:
    """One layer's B of every adapter [O', r], where they read in ``x A^T`` and write in ``y``, and their gradients."""

    b: Sequence[Tensor]
    grad_b: Sequence[Tensor]
    hidden: slice
    columns: slice


class Groups:
    """The rows of each adapter of a row of tokens, one stretch after the other."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.rows = Rows(segments, device)
        self.count, self.first, self.last = len(segments), segments[0][0], segments[-1][1]
        ends = [end - self.first for _, end, _ in segments]
        self._ends_T = torch.tensor(ends, dtype=torch.int32, device=device)

    def matmul(self, x_NK: Tensor, w_TKM: Tensor) -> Tensor:
        """``x`` times each adapter's own ``w``, [N, M]."""
        if suits(x_NK, w_TKM):
            return F.grouped_mm(x_NK, w_TKM, offs=self._ends_T)
        return self.rows.gather(torch.bmm(self.rows.spread(x_NK), w_TKM))

    def outer(self, left_NO: Tensor, right_NR: Tensor) -> Tensor:
        """``left^T right`` of each adapter's rows, [T, O, R]; cheapest with the narrow one on the right."""
        return torch.bmm(self.rows.spread(left_NO).transpose(1, 2), self.rows.spread(right_NR, zeros=True))


def groups_of(segments: Sequence[Segment], device: torch.device) -> Groups | None:
    """None where one matmul per adapter is no worse: few adapters, or rows of very different number."""
    names = {name for _, _, name in segments}
    if None in names or not 2 <= len(segments) == len(names) <= _MOST:
        return None
    widest = max(end - start for start, end, _ in segments)
    if widest * len(segments) > 2 * segments[-1][1]:
        return None
    return Groups(segments, device)


class GroupedStack:
    """``a`` [T, R, I] and every layer's ``b`` [T, O', r], the latter scaled; gradients go to each adapter's own."""

    def __init__(
        self,
        groups: Groups,
        a: Sequence[Tensor],
        grad_a: Sequence[Tensor],
        scales: Sequence[float],
        members: Sequence[Member],
    ) -> None:
        self._groups, self._grad_a, self._members = groups, grad_a, members
        self._a_TRI = torch.stack(list(a))
        self._scale_T11 = torch.tensor(scales, device=self._a_TRI.device)[:, None, None]
        scale_T11 = self._scale_T11.to(self._a_TRI.dtype)
        self._bs_TOR = [torch.stack(list(member.b)) * scale_T11 for member in members]

    def update(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """``y += scale * (x A^T) B^T`` in place; returns ``x A^T`` [N, R]."""
        h_NR = self._groups.matmul(x_NI, self._a_TRI.transpose(1, 2))
        for member, b_TOR in zip(self._members, self._bs_TOR, strict=True):
            y_NO[:, member.columns] += self._groups.matmul(h_NR[:, member.hidden], b_TOR.transpose(1, 2))
        return h_NR

    def pull(self, dy_NO: Tensor, x_NI: Tensor, h_NR: Tensor, dx_NI: Tensor | None) -> None:
        """Gradients of A and B into their accumulators, the rest added to ``dx_NI`` if that is wanted."""
        groups = self._groups
        dh = []
        for member, b_TOR in zip(self._members, self._bs_TOR, strict=True):
            dy = dy_NO[:, member.columns]
            dh.append(groups.matmul(dy, b_TOR))
            _add(member.grad_b, groups.outer(dy, h_NR[:, member.hidden]) * self._scale_T11)
        dh_NR = dh[0] if len(dh) == 1 else torch.cat(dh, 1)
        _add(self._grad_a, groups.outer(x_NI, dh_NR).transpose(1, 2))
        if dx_NI is not None:
            dx_NI += groups.matmul(dh_NR, self._a_TRI)


def _add(grads: Sequence[Tensor], more_T: Tensor) -> None:
    torch._foreach_add_(list(grads), list(more_T.float().unbind()))


def suits(x_NK: Tensor, w_TKM: Tensor) -> bool:
    """Whether torch's grouped matmul takes such factors, and has a kernel for where they are."""
    sizes = (*w_TKM.shape[1:], x_NK.stride(0), x_NK.storage_offset())
    aligned = x_NK.stride(1) == 1 and all(size % _ALIGNED == 0 for size in sizes)
    return aligned and _has_kernel(x_NK.device, x_NK.dtype)


@cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped matmul for this device that does what it should; which do depends on the version."""
    if not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cuda" and (
        dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in _FUSED
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    x_NK = torch.randn(40, 32, generator=generator).to(device, dtype)
    w_TMK = torch.randn(3, 16, 32, generator=generator).to(device, dtype)
    ends = (5, 24, 40)
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    parts = zip((0, *ends), ends, w_TMK, strict=False)
    expected_NM = torch.cat([x_NK[start:end] @ w.t() for start, end, w in parts])
    try:
        ways = (
            F.grouped_mm(x_NK, w_TMK.transpose(1, 2), offs=offsets),
            F.grouped_mm(x_NK, w_TMK.transpose(1, 2).contiguous(), offs=offsets),
        )
        return all(torch.allclose(way, expected_NM, rtol=2e-2, atol=2e-2) for way in ways)
    except (RuntimeError, ValueError, TypeError):
        return False
