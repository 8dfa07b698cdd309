"""Linear layers with one input (query, key and value; gate and up) as one matmul, and their adapters as few.

The base weights are laid side by side once, and the model's own parameters become views of that. The A matrices of an
adapter in such layers lie side by side too (:mod:`~tuft_jupyter.engine.lora` allocates them so), so ``x A^T``, its
gradient and the adapter's share of dx are one thin matmul each instead of one per layer; a thin matmul three times as
wide costs little more. Knows nothing of decoders or attention.

Shapes: N tokens of the row, I inputs, O outputs of all layers together, R an adapter's ranks over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from tuft_jupyter.engine.frozen import Frozen
from tuft_jupyter.engine.grouped import GroupedStack, Groups, Member
from tuft_jupyter.engine.lora import MultiLoraLinear
from tuft_jupyter.engine.low_rank import Slot, accumulate, take
from tuft_jupyter.engine.packing import Segment, boundaries
from tuft_jupyter.engine.side_by_side import Rows, SideBySide


@dataclass(frozen=True, slots=True)
class _Member:
    """One layer's B [O', r]: it reads ``hidden`` columns of [N, R] and writes ``columns`` of [N, O]."""

    b: Tensor
    grad_b: Tensor | None
    hidden: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class _Stack:
    """One adapter's A matrices of neighbouring layers as one ``a`` [R, I], with their gradients."""

    a: Tensor
    grad_a: Tensor | None
    scale: float
    members: tuple[_Member, ...]

    def update(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """``y += scale * (x A^T) B^T`` in place; returns ``x A^T`` [N, R]."""
        h_NR = torch.mm(x_NI, self.a.t())
        for member in self.members:
            y_NO[:, member.columns].addmm_(h_NR[:, member.hidden], member.b.t(), alpha=self.scale)
        return h_NR

    def pull(self, dy_NO: Tensor, x_NI: Tensor, h_NR: Tensor, dx_NI: Tensor | None) -> None:
        """Gradients of A and B into their accumulators, the rest added to ``dx_NI`` if that is wanted."""
        dh = [torch.mm(dy_NO[:, member.columns], member.b) for member in self.members]
        dh_NR = dh[0] if len(dh) == 1 else torch.cat(dh, 1)
        if self.grad_a is not None:
            for member in self.members:
                assert member.grad_b is not None
                accumulate(member.grad_b, dy_NO[:, member.columns].t(), h_NR[:, member.hidden], self.scale)
            accumulate(self.grad_a, dh_NR.t(), x_NI, self.scale)
        if dx_NI is not None:
            dx_NI.addmm_(dh_NR, self.a, alpha=self.scale)


@dataclass(frozen=True, slots=True)
class _Together:
    """All adapters of a row at once; see :mod:`~tuft_jupyter.engine.side_by_side`."""

    rows: Rows
    weights: SideBySide

    def update(self, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        self.weights.update(self.rows, x_NI, y_NO)
        return x_NI.new_empty(0)

    def pull(self, dy_NO: Tensor, x_NI: Tensor, h_NR: Tensor, dx_NI: Tensor | None) -> None:
        raise RuntimeError("adapters that are computed together are only read")


StackedPart = tuple[int, int, _Stack | _Together | GroupedStack]
_Stacked = tuple[tuple[ref[Slot], ...], list[_Stack]]
"""What was stacked, and how. It holds no slot: an adapter that is removed takes its stacks along."""


class Linears:
    """The linear layers ``names`` of ``parent``; to be made before adapters are."""

    def __init__(self, parent: nn.Module, *names: str, copies: bool = False) -> None:
        self._parent, self._names = parent, names
        modules: list[nn.Linear] = [getattr(parent, name) for name in names]
        self._columns = [
            slice(a, b) for a, b in pairwise(boundaries([module.out_features for module in modules]))
        ]
        self._stacks: WeakKeyDictionary[Slot, _Stacked] = WeakKeyDictionary()
        self._together: WeakKeyDictionary[Slot, tuple[tuple[ref[Slot], ...], SideBySide]] = (
            WeakKeyDictionary()
        )  # of the adapters that were last read together
        weight, bias = modules[0].weight.detach(), modules[0].bias
        if len(modules) > 1:
            weight = torch.cat([module.weight.detach() for module in modules])
            if bias is not None:
                bias = nn.Parameter(torch.cat([module.bias for module in modules]), requires_grad=False)
            for module, columns in zip(modules, self._columns, strict=True):
                module.weight = nn.Parameter(weight[columns], requires_grad=False)
        self._base = Frozen(weight, bias, copies=copies)

    def parts(self, segments: Sequence[Segment], together: Rows | Groups | None = None) -> list[StackedPart]:
        """For each segment the stacks of its adapter in these layers; more than one if they are not neighbours.

        With ``together`` one part for all of them, where their geometry is the same, and they are only read (for
        ``Rows``) or all trained (for ``Groups``).
        """
        modules = [getattr(self._parent, name) for name in self._names]
        found: list[tuple[int, int, _Stack]] = []
        firsts: list[Slot] = []
        for start, end, name in segments:
            slots = [
                (module.slots[name], columns)
                for module, columns in zip(modules, self._columns, strict=True)
                if isinstance(module, MultiLoraLinear) and name in module.slots
            ]
            if slots:
                found += [(start, end, stack) for stack in self._stacked(slots)]
                firsts.append(slots[0][0])
        stacks = [stack for _, _, stack in found]
        if together is None or together.count != len(firsts) or not _alike(stacks, len(firsts)):
            return list(found)
        if isinstance(together, Groups) and stacks[0].grad_a is not None:
            return [(together.first, together.last, _grouped(together, stacks))]
        if isinstance(together, Rows) and stacks[0].grad_a is None and len({s.scale for s in stacks}) == 1:
            return [(together.first, found[-1][1], _Together(together, self._beside(firsts, stacks)))]
        return list(found)

    def _beside(self, firsts: list[Slot], stacks: list[_Stack]) -> SideBySide:
        of, weights = self._together.get(firsts[0], ((), None))
        if weights is None or [slot() for slot in of] != firsts:
            bs = [
                ([stack.members[i].b for stack in stacks], member.hidden, member.columns)
                for i, member in enumerate(stacks[0].members)
            ]
            weights = SideBySide([stack.a for stack in stacks], bs, stacks[0].scale)
            self._together.clear()
            self._together[firsts[0]] = tuple(ref(slot) for slot in firsts), weights
        return weights

    def __call__(
        self, x_NI: Tensor, parts: Sequence[StackedPart], residual: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """``x W^T + b + residual`` with every part's update, and each part's ``x A^T``."""
        y_NO = self._base(x_NI) if residual is None else self._base.plus(x_NI, residual)
        return y_NO, [
            stack.update(take(x_NI, start, end), take(y_NO, start, end)) for start, end, stack in parts
        ]

    def pull(
        self,
        dy_NO: Tensor,
        x_NI: Tensor,
        parts: Sequence[StackedPart],
        hidden: Sequence[Tensor],
        *,
        needs_dx: bool = True,
    ) -> Tensor:
        """Add the adapters' gradients to their slots; the gradient in x, new memory (empty if not needed)."""
        dx_NI = self._base.pull(dy_NO) if needs_dx else dy_NO.new_empty(0)
        for (start, end, stack), h_NR in zip(parts, hidden, strict=True):
            dx = take(dx_NI, start, end) if needs_dx else None
            stack.pull(take(dy_NO, start, end), take(x_NI, start, end), h_NR, dx)
        return dx_NI

    def _stacked(self, slots: list[tuple[Slot, slice]]) -> list[_Stack]:
        of, known = self._stacks.get(slots[0][0], ((), []))
        if [slot() for slot in of] != [slot for slot, _ in slots]:
            groups: list[list[tuple[Slot, slice]]] = []
            for slot, columns in slots:
                if groups and _neighbours(groups[-1][-1][0], slot):
                    groups[-1].append((slot, columns))
                else:
                    groups.append([(slot, columns)])
            known = [_stack(group) for group in groups]
            self._stacks[slots[0][0]] = tuple(ref(slot) for slot, _ in slots), known
        return known


def _grouped(groups: Groups, stacks: list[_Stack]) -> GroupedStack:
    members = [
        Member(
            [stack.members[i].b for stack in stacks],
            [grad for stack in stacks if (grad := stack.members[i].grad_b) is not None],
            member.hidden,
            member.columns,
        )
        for i, member in enumerate(stacks[0].members)
    ]
    grad_a = [stack.grad_a for stack in stacks if stack.grad_a is not None]
    return GroupedStack(groups, [s.a for s in stacks], grad_a, [s.scale for s in stacks], members)


def only_rows(
    parts: Sequence[StackedPart], hidden: Sequence[Tensor], rows_M: Tensor
) -> tuple[list[StackedPart], list[Tensor]]:
    """The parts, and their ``x A^T``, of some rows (sorted) standing by themselves."""
    edges = torch.tensor([edge for start, end, _ in parts for edge in (start, end)], device=rows_M.device)
    at = iter(torch.searchsorted(rows_M, edges).tolist())
    found: list[StackedPart] = []
    kept: list[Tensor] = []
    for (start, _, stack), h_NR in zip(parts, hidden, strict=True):
        first, last = next(at), next(at)
        if first < last:
            found.append((first, last, stack))
            kept.append(h_NR[rows_M[first:last] - start])
    return found, kept


def _alike(stacks: list[_Stack], count: int) -> bool:
    """Whether these are so many stacks of one geometry, all trained or all only read."""
    one = stacks[0]
    shape = [(member.hidden, member.columns) for member in one.members]
    return len(stacks) == count and all(
        stack.a.shape == one.a.shape
        and (stack.grad_a is None) == (one.grad_a is None)
        and [(member.hidden, member.columns) for member in stack.members] == shape
        for stack in stacks
    )


def _neighbours(one: Slot, other: Slot) -> bool:
    """Whether the other's A, and its gradient, begin where the one's end, and both are scaled alike."""
    pairs = [(one.a, other.a)]
    if one.grad_a is not None and other.grad_a is not None:
        pairs.append((one.grad_a, other.grad_a))
    return (
        one.scale == other.scale
        and (one.grad_a is None) == (other.grad_a is None)
        and all(
            a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
            and a.storage_offset() + a.numel() == b.storage_offset()
            and a.shape[1] == b.shape[1]
            for a, b in pairs
        )
    )


def _stack(group: list[tuple[Slot, slice]]) -> _Stack:
    edges = boundaries([len(slot.a) for slot, _ in group])
    first = group[0][0]

    def whole(tensor: Tensor) -> Tensor:
        return torch.as_strided(tensor, (edges[-1], tensor.shape[1]), (tensor.shape[1], 1))

    return _Stack(
        whole(first.a),
        None if first.grad_a is None else whole(first.grad_a),
        first.scale,
        tuple(
            _Member(slot.b, slot.grad_b, slice(a, b), columns)
            for (slot, columns), (a, b) in zip(group, pairwise(edges), strict=True)
        ),
    )
