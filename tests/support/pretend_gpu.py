"""A GPU that is not there: tensors that say they are on ``cuda:0``, keep a GPU's rules, and compute on the CPU.

Code for a GPU fails most often for reasons that have little to do with one: an operation whose tensors are on different
devices, a ``numpy()`` of something on the GPU, a branch for the wrong device, a kernel given what it does not take.
Inside :func:`pretend_gpu` a machine without a GPU finds them: ``device="cuda"`` gives an :class:`OnGpu`, which holds a
CPU tensor; every operation is seen by :class:`_Rules`, refused where CUDA would refuse it, and computed on what is
held. So the numbers are real (a CPU's), and can be compared.

What it does not show: a GPU's speed, memory, streams, threads and rounding; the kernels themselves, and what they
refuse beyond what :mod:`tests.support.gpu_kernels` says. C++ takes these tensors for the CPU's: an operation that is
others put together goes a CPU's way where it asks for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.gpu_kernels import KERNELS

GPU = torch.device("cuda:0")
H100, A100, T4 = (9, 0), (8, 0), (7, 5)
MEMORY = 8 << 30
_aten = torch.ops.aten

_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
"""A tensor on the GPU may be indexed by tensors on the CPU."""
_SCALARS = {_aten.fill_.Tensor, _aten.where.self} | _INDEXED
"""Beside what goes element by element over two: operations that take a CPU's tensor of no dimensions."""


class OnGpu(Tensor):
    """Says that it is on the GPU; ``held`` is its memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        with torch.inference_mode(held.is_inference()):  # there too a view of a weight is an ordinary tensor
            made = Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="cpu"
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of pretend_gpu()")

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype=dtype or self.dtype, copy=copy)
        if self.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("no gradient goes from the CPU back to the pretended GPU")
        return self.held.to(device, dtype, copy=True)

    def cpu(self, *args: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"OnGpu({self.held!r})"


class _Rules(TorchDispatchMode):
    """Sees every operation; ``seen`` counts them by name."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_composite(func):
            with self:  # in inference mode operations arrive that are others put together
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        device, tensors = kwargs.get("device"), list(_tensors((args, kwargs)))
        ours = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}
        if not ours and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        if ours:
            _check_devices(func, args, tensors)
        self.seen[func.name()] += 1
        args, kwargs = (
            _changed(of, lambda t: t.held if isinstance(t, OnGpu) else t) for of in (args, kwargs)
        )
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kernel = KERNELS.get(func.name(), lambda _, *args, **kwargs: func(*args, **kwargs))
        out = kernel(self.capability, *args, **kwargs)
        if func is _aten.copy_.default and not isinstance(tensors[0], OnGpu):
            return out

        def wrapped(t: Tensor) -> Tensor:
            known = ours.get(id(t))  # what was changed in place is the tensor that it was
            if known is not None and (known.shape, known.stride()) != (t.shape, t.stride()):
                raise NotImplementedError(f"{func} changes a shape in place")
            return OnGpu(t) if known is None else known

        return _changed(out, wrapped)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _changed(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """With every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(one, change) for key, one in value.items()}
    return type(value)(_changed(one, change) for one in value) if isinstance(value, list | tuple) else value


def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """RuntimeError if CUDA would not take these tensors together."""
    if func is _aten.copy_.default:
        return
    scalars = func in _SCALARS or (torch.Tag.pointwise in func.tags and len(tensors) == 2)
    written = args[0] if func._schema.is_mutable else None
    indices = [t for t in args[1] if t is not None] if func in _INDEXED and isinstance(args[0], OnGpu) else []
    for t in tensors:
        scalar = scalars and t.dim() == 0 and t is not written
        if not isinstance(t, OnGpu) and not scalar and not any(t is index for index in indices):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func}, {tuple(t.shape)} on {t.device}"
            )


def _then_moved(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def moved(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> Tensor:
        made = data if isinstance(data, Tensor) else function(data, dtype=dtype, **more)
        return made.to(device or made.device, dtype or made.dtype)

    return moved


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """For :meth:`Tensor.to`: only a CUDA build knows which number a ``cuda`` without one has."""

    def numbered(where: Any) -> Any:
        named = isinstance(where, str | torch.device) and torch.device(where).type == "cuda"
        return GPU if named else where

    args, kwargs = tuple(map(numbered, args)), {key: numbered(value) for key, value in kwargs.items()}
    return torch._C.TensorBase.to(self, *args, **kwargs)


@contextmanager
def pretend_gpu(capability: tuple[int, int] = H100) -> Iterator[Counter[str]]:
    """One GPU of this compute capability, half of its memory free; gives the operations that are asked of it."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=MEMORY),
        "mem_get_info": lambda device=None: (MEMORY // 2, MEMORY),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    made = {name: _then_moved(getattr(torch, name)) for name in ("tensor", "as_tensor")}
    with (
        patch.multiple(torch.cuda, **answers),
        patch.multiple(torch, **made),  # unseen, these would go to the device
        patch.object(torch.__future__, "_swap_module_params_on_conversion", True),  # for Module.to
        patch.object(Tensor, "to", _to),
        _Rules(capability) as rules,
    ):
        yield rules.seen
