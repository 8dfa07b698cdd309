"""Experts whose matrices are one tensor, with adapters of many tenants.

Mixtral, Qwen 3 MoE and gpt-oss hold the matrices of all experts of a layer in two tensors. transformers lets others
compute them (its experts interface), and PEFT adapts such a tensor as a whole (``target_parameters``): every expert has
an update of the adapter's rank. Here the rows of a packed row are sorted by expert, and those of one expert stay in the
order of the segments: so each adapter has one stretch of rows in each expert, and what is done there is what
:mod:`~tuft_jupyter.engine.low_rank` does in a linear layer.

Shapes: T tokens, K experts of each, P = T K rows, E experts, I inputs, O outputs, R rank.
Reference: Shazeer et al. 2017, the sparsely-gated mixture of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from tuft_jupyter.engine import grouped, packing
from tuft_jupyter.engine.low_rank import Part, Slot, add_updates, pull_updates, take

IMPLEMENTATION = packing.ATTENTION
_KNOWN = "_tuft_experts"


class ExpertSlot:
    """One adapter in one such tensor, laid out as PEFT does: ``a`` [E R, I], one expert after the other, and ``b``
    [O, R E], the expert last. Gradients likewise, None if the adapter is only read."""

    def __init__(
        self, experts: int, a: Tensor, b: Tensor, scale: float, grad_a: Tensor | None, grad_b: Tensor | None
    ) -> None:
        self._experts, self._scale = experts, scale
        self._a, self._b, self._grad_a, self._grad_b = a, b, grad_a, grad_b
        self._of: dict[int, Slot] = {}

    def of(self, expert: int) -> Slot:
        """Its update of one expert's matrix; made when a row first needs it, of a hundred experts few are."""
        if expert not in self._of:
            grad_a = None if self._grad_a is None else self._rows(self._grad_a, expert)
            grad_b = None if self._grad_b is None else self._columns(self._grad_b, expert)
            self._of[expert] = Slot(
                self._rows(self._a, expert), self._columns(self._b, expert), self._scale, grad_a, grad_b
            )
        return self._of[expert]

    def _rows(self, a: Tensor, expert: int) -> Tensor:
        return a.view(self._experts, -1, a.shape[1])[expert]

    def _columns(self, b: Tensor, expert: int) -> Tensor:
        return b.view(len(b), -1, self._experts)[..., expert]


@dataclass(frozen=True, slots=True)
class _Routed:
    """The rows of a packed row sorted by expert: where each came from, and what belongs together.

    ``experts`` has the rows of each expert that has any, ``stretches`` those of one segment in one of them.
    """

    order: Tensor  # [P], among T K
    back: Tensor  # [T K], where each went
    expert: Tensor  # [P]
    ends: Tensor  # [E], int32
    experts: list[tuple[int, int, int]]
    stretches: list[tuple[int, int, int, str]]

    @classmethod
    def of(cls, packed: packing.Packed, index_TK: Tensor, experts: int) -> _Routed:
        flat_P, chosen = index_TK.reshape(-1), index_TK.shape[1]
        order_P = torch.argsort(flat_P, stable=True)
        expert_P = flat_P[order_P]
        segments = packed.segments
        segment_P = _segments(packed, index_TK.device)[order_P // chosen]
        counts = torch.bincount(expert_P * len(segments) + segment_P, minlength=experts * len(segments))
        ends_E = counts.view(experts, -1).sum(1).cumsum(0).to(torch.int32)
        found: list[tuple[int, int, int]] = []
        stretches: list[tuple[int, int, int, str]] = []
        end = 0
        for expert, own in enumerate(counts.view(experts, -1).tolist()):
            first = end
            for (_, _, name), count in zip(segments, own, strict=True):
                if count and name is not None:
                    stretches.append((expert, end, end + count, name))
                end += count
            if end > first:
                found.append((expert, first, end))
        return cls(order_P, torch.argsort(order_P), expert_P, ends_E, found, stretches)


def _segments(packed: packing.Packed, device: torch.device) -> Tensor:
    """The number of each token's segment [T]."""
    key = ("experts", device)
    if key not in packed.memo:
        lengths = torch.tensor([end - start for start, end, _ in packed.segments])
        packed.memo[key] = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    known: Tensor = packed.memo[key]
    return known


class ExpertWeights:
    """One tensor ``name`` of a layer's experts, with any number of adapters."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd call us where x needs no gradient
        self.slots: dict[str, ExpertSlot] = {}

    def weights(self) -> Tensor:
        """[E, I, O]."""
        weight: Tensor = getattr(self._module, self._name).detach()
        return weight if self._module.is_transposed else weight.transpose(1, 2)

    def shapes(self, rank: int) -> tuple[torch.Size, torch.Size]:
        """Of an adapter's A and B in a file."""
        experts, inputs, outputs = self.weights().shape
        return torch.Size((experts * rank, inputs)), torch.Size((outputs, rank * experts))

    def put(
        self, name: str, a: Tensor, b: Tensor, scale: float, grad_a: Tensor | None, grad_b: Tensor | None
    ) -> None:
        self.slots[name] = ExpertSlot(len(self.weights()), a, b, scale, grad_a, grad_b)

    def __call__(self, x_PI: Tensor, rows: _Routed) -> Tensor:
        parts = [
            (start, end, self.slots[name].of(expert))
            for expert, start, end, name in rows.stretches
            if name in self.slots
        ]
        bias_EO: Tensor | None = (
            getattr(self._module, f"{self._name}_bias") if self._module.has_bias else None
        )
        y: Tensor = _Experts.apply(x_PI, self._anchor, self.weights(), bias_EO, rows, parts)
        return y


class _Experts(torch.autograd.Function):
    """Each row times its expert's matrix, plus the update of its adapter there; gradients of those go to the slots."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_PI: Tensor,
        anchor: Tensor,
        weight_EIO: Tensor,
        bias_EO: Tensor | None,
        rows: _Routed,
        parts: list[Part],
    ) -> Tensor:
        y_PO = _multiply(x_PI, weight_EIO, rows)
        if bias_EO is not None:
            y_PO += bias_EO[rows.expert]
        hidden = add_updates(x_PI, parts, y_PO)
        ctx.save_for_backward(x_PI, *hidden)
        ctx.weight_EIO, ctx.rows, ctx.parts = weight_EIO, rows, parts
        return y_PO

    @staticmethod
    def backward(ctx: Any, dy_PO: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:  # type: ignore[override]
        x_PI, *hidden = ctx.saved_tensors
        dy_PO = dy_PO.contiguous()
        needed = ctx.needs_input_grad[0]
        dx_PI = _multiply(dy_PO, ctx.weight_EIO.transpose(1, 2), ctx.rows) if needed else None
        pull_updates(dy_PO, x_PI, ctx.parts, hidden, dx_PI)
        return dx_PI, None, None, None, None, None


def _multiply(x_PI: Tensor, weight_EIO: Tensor, rows: _Routed) -> Tensor:
    if x_PI.device.type != "cpu" and grouped.suits(x_PI, weight_EIO):
        return F.grouped_mm(x_PI, weight_EIO, offs=rows.ends)
    parts = [torch.mm(take(x_PI, start, end), weight_EIO[expert]) for expert, start, end in rows.experts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _forward(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """A layer's experts over the active packed row, as transformers calls them."""
    packed = packing.current()
    if packed is None:
        raise RuntimeError("a packed model was called outside of Packed.active()")
    rows = _Routed.of(packed, index_TK, module.num_experts)
    weights, chosen = of(module), index_TK.shape[1]
    gated = getattr(module, "has_gate", True)  # earlier versions of transformers know no others
    y = weights["gate_up_proj" if gated else "up_proj"](hidden_TD[rows.order // chosen], rows)
    y = module._apply_gate(y) if gated else module.act_fn(y)
    y = weights["down_proj"](y, rows)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y_TKD = (y * weights_TK.reshape(-1)[rows.order, None])[rows.back].view(*index_TK.shape, -1)
    return y_TKD.sum(1).to(hidden_TD.dtype)


ExpertsInterface.register(IMPLEMENTATION, _forward)


def of(module: nn.Module) -> Mapping[str, ExpertWeights]:
    """The tensors of a layer's experts, in the order in which PEFT wraps them."""
    known: dict[str, ExpertWeights] | None = getattr(module, _KNOWN, None)
    if known is None:
        own = module.named_parameters(recurse=False)
        known = {name: ExpertWeights(module, name) for name, tensor in own if tensor.dim() == 3}
        object.__setattr__(module, _KNOWN, known)
    return known


def layers(hf: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, by their paths, whose experts are computed here."""
    for path, module in hf.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            yield path, module


def take_over(hf: nn.Module) -> None:
    """Compute a model's experts here from now on. The setter for this takes only what transformers has, in 5.0."""
    for _, module in layers(hf):
        config: Any = module.config
        config._experts_implementation = IMPLEMENTATION


def targets(hf: nn.Module) -> list[str]:
    """PEFT's ``target_parameters`` for all experts of a model; empty if it has none."""
    return sorted(
        {".".join([*path.split(".")[-2:], name]) for path, module in layers(hf) for name in of(module)}
    )


def targeted(hf: nn.Module, wanted: set[str]) -> dict[str, ExpertWeights]:
    """What ``target_parameters`` name, by the paths under which PEFT would keep their adapters.

    A module with two adapted tensors is wrapped twice there, the first one inside. KeyError for a target that names
    no tensor of experts.
    """
    found: dict[str, ExpertWeights] = {}
    left = set(wanted)
    for path, module in layers(hf):
        names = {name: {t for t in wanted if f".{path}.{name}".endswith(f".{t}")} for name in of(module)}
        adapted = [name for name, matches in names.items() if matches]
        left -= set().union(*names.values())
        for depth, name in enumerate(reversed(adapted)):
            found[path + depth * ".base_layer"] = of(module)[name]
    if left:
        raise KeyError(min(left))
    return found
