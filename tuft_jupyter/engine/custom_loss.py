"""Losses that users wrote, run as what they are: graphs of allowed operations, never code.

:func:`custom_loss` makes a :class:`~tuft_jupyter.engine.losses.Loss` of a checked
:class:`~tuft_jupyter.core.loss_graph.LossGraph`. Each node is looked up in a table of functions and called; there is
no eval, no unpickling and no attribute that the lists of ``loss_graph`` do not name.

A graph is computed on the CPU, whatever trains the model: log-probabilities are small, and an index out of range is
an error there and the end of the worker on a GPU. Before it is computed it is followed over shapes alone (on torch's
``meta`` device, which holds no numbers), so that one that would grow beyond :func:`allowance` is refused before
anything is allocated.

Gradients are those of ``forward_backward_custom`` on the client: dL/dlogprobs by autograd, per datum.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.loss_graph import FUNCTIONS, LOGPROBS, MAX_INTEGER, LossGraph, Node, from_id
from tuft_jupyter.core.types import Datum

CPU = torch.device("cpu")
META = torch.device("meta")

Value = Any
"""What a node gives: a tensor, a number, a shape, a dtype, a device, or a tuple of these."""


def _resolved(target: str) -> Callable[..., Any]:
    """The function an allowed name stands for; the name comes from our list, not from a request."""
    if target == "getattr":
        return getattr
    module, *path = target.split(".")
    found: Any = {"torch": torch, "math": math, "operator": operator}[module]
    return functools.reduce(getattr, path, found)  # type: ignore[no-any-return]


_TABLE: Mapping[str, Callable[..., Any]] = {target: _resolved(target) for target in sorted(FUNCTIONS)}


def allowance(elements: int) -> int:
    """Elements that all values of a loss over ``elements`` log-probabilities may have together."""
    return 65_536 + 1024 * elements


@dataclass(frozen=True, slots=True)
class Program:
    """A graph that can be run on one datum's ``logprobs`` and further inputs."""

    graph: LossGraph

    @property
    def ranks(self) -> Mapping[str, int]:
        """Of the inputs beside logprobs, by name."""
        return dict(self.graph.inputs[1:])

    @property
    def has_metrics(self) -> bool:
        return bool(_output(self.graph.nodes[-1])[1])

    @property
    def logprobs_rank(self) -> int:
        return self.graph.inputs[0][1]

    def check(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """UserError, naming the node, if the graph cannot be run on inputs like these, or grows too large."""
        inputs = {
            name: torch.empty(shape, dtype=dtype, device=META) for name, (shape, dtype) in shapes.items()
        }
        with torch.no_grad(), META:
            loss, _ = self._run(inputs, META)
        if not loss.dtype.is_floating_point:
            raise UserError(f"the loss is of type {loss.dtype}; return a floating-point tensor")

    def evaluate(self, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(the loss as a scalar, its slope shaped as ``logprobs``), on the CPU. UserError if either is no number."""
        with torch.enable_grad():
            p = logprobs.detach().to(CPU, torch.float32, copy=True).requires_grad_()
            loss, _ = self._run({LOGPROBS: p, **inputs}, CPU)
            if not bool(torch.isfinite(loss)):
                raise UserError(
                    f"the loss is {float(loss.detach())}; keep its terms away from overflow and log(0)"
                )
            if not loss.requires_grad:
                raise UserError("the loss does not depend on logprobs; there is nothing to learn from it")
            try:
                (slope,) = torch.autograd.grad(loss, p)
            except RuntimeError as error:
                raise UserError(f"the loss has no gradient: {_one_line(error)}") from None
        if not bool(torch.isfinite(slope).all()):
            raise UserError(
                "the loss's slope in logprobs is not finite; keep its terms away from 0/0, log(0) and sqrt(0)"
            )
        return loss.detach(), slope

    def metrics(self, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, float]:
        """The further numbers that the loss says of a datum, by the names its writer gave them."""
        if not self.has_metrics:
            return {}
        with torch.no_grad():
            _, metrics = self._run({LOGPROBS: logprobs.to(CPU), **inputs}, CPU)
        return {name: float(value) for name, value in metrics.items()}

    def _run(self, inputs: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        values: dict[str, Value] = {}
        elements = inputs[LOGPROBS].numel()
        left = allowed = allowance(elements)
        for node in self.graph.nodes[:-1]:
            if node.op == "placeholder":
                values[node.name] = inputs[node.target]
                continue
            value = values[node.name] = _called(node, values, device)
            left -= _elements(node, value)
            if left < 0:
                raise UserError(
                    f"{_title(node)}: the values of the loss grow beyond {allowed} elements, the limit for "
                    f"{elements} log-probabilities; keep to tensors of their size"
                )
        return _returned(self.graph.nodes[-1], values)


def as_given(ranks: Mapping[str, int], datum: Datum) -> dict[str, Tensor]:
    """A datum's inputs to a loss, of the types in which they were sent."""
    return {
        name: torch.from_numpy(datum.inputs[name].reshape(() if rank == 0 else datum.inputs[name].shape))
        for name, rank in ranks.items()
    }


def program(loss_id: object) -> Program:
    """The program of a ``loss_id``; UserError if it is none."""
    return Program(from_id(loss_id if isinstance(loss_id, str) else ""))


def _called(node: Node, values: Mapping[str, Value], device: torch.device) -> Value:
    args = [_argument(arg, values, device) for arg in node.args]
    kwargs = {key: _argument(arg, values, device) for key, arg in (node.kwargs or {}).items()}
    if node.op == "call_method":
        if not args or not isinstance(args[0], Tensor):
            raise UserError(f"{_title(node)}: a method of a tensor is called on something else")
        function: Callable[..., Any] = getattr(torch.Tensor, node.target)
    else:
        function = _TABLE[node.target]
        if node.target.startswith(("operator.", "math.")):
            args = _numeric(node, args)
        elif node.target == "getattr" and not isinstance(args[0], Tensor | tuple):
            raise UserError(f"{_title(node)}: only a tensor has attributes a loss may read")
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - whatever torch says of these arguments is their writer's to mend
        raise UserError(f"{_title(node)}: {_one_line(error)}") from None


def _numeric(node: Node, args: list[Value]) -> list[Value]:
    """The arguments of an operator: tensors and numbers (nothing repeats a list), and powers of numbers as floats."""
    picking = node.target == "operator.getitem"
    if picking and not (args and isinstance(args[0], Tensor | tuple)):
        raise UserError(f"{_title(node)}: only a tensor or a shape can be indexed")
    for arg in args[1:] if picking else args:
        if not (picking or isinstance(arg, Tensor | int | float)):
            raise UserError(f"{_title(node)}: {type(arg).__name__} is neither a tensor nor a number")
    if node.target == "operator.pow" and not any(isinstance(arg, Tensor) for arg in args):
        return [float(arg) for arg in args]
    return args


def _argument(arg: Any, values: Mapping[str, Value], device: torch.device) -> Value:
    """What an argument, checked by ``loss_graph``, stands for."""
    if isinstance(arg, list):
        return [_argument(part, values, device) for part in arg]
    if not isinstance(arg, dict):
        return arg
    ((kind, value),) = arg.items()
    match kind:
        case "ref":
            return values[value]
        case "tuple":
            return tuple(_argument(part, values, device) for part in value)
        case "slice":
            return slice(*(_argument(part, values, device) for part in value))
        case "ellipsis":
            return ...
        case "float":
            return float(value)
        case "dtype":
            return getattr(torch, value)
        case "device":
            return device
        case _:
            return torch.preserve_format


def _elements(node: Node, value: Value) -> int:
    """Elements of a node's value; UserError if it is of a kind that no later node may see."""
    if isinstance(value, Tensor):
        if value.is_sparse or value.is_complex():
            raise UserError(f"{_title(node)}: sparse and complex tensors are not offered in a loss")
        return value.numel()
    if isinstance(value, tuple):
        return sum(_elements(node, part) for part in value)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError(f"{_title(node)}: a whole number grows beyond 2^53")
    if isinstance(value, bool | int | float | torch.dtype | torch.device):
        return 1
    raise UserError(f"{_title(node)}: gives {type(value).__name__}, which a loss has no use for")


def _returned(node: Node, values: Mapping[str, Value]) -> tuple[Tensor, dict[str, Tensor]]:
    loss_name, named = _output(node)
    loss = values[loss_name]
    metrics = {key: values[name] for key, name in named.items()}
    for name, value in (("loss", loss), *metrics.items()):
        if not isinstance(value, Tensor) or value.numel() != 1 or (name == "loss" and value.ndim):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name}: must be a tensor of one number, not {shape}; sum over what is left")
    return loss, metrics


def _output(node: Node) -> tuple[str, dict[str, str]]:
    """The node that is the loss, and those that are metrics, by their names."""
    (pair,) = node.args
    loss, metrics = pair["tuple"] if isinstance(pair, dict) else pair
    return loss["ref"], {key: value["ref"] for key, value in metrics["dict"].items()}


def _title(node: Node) -> str:
    return f"custom loss, node {node.name} ({node.target})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
