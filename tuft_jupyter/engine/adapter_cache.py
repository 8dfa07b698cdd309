"""Adapters for sampling: loaded from checkpoint directories once, kept while they are of use.

The key is the directory and what lies in it now, so a checkpoint saved again under the same name is read
again. At most ``capacity`` adapters are held; the one used least recently goes first, never one that is in
use. Knows nothing of requests: whoever takes an adapter gives it back.

PEFT resolves each geometry once, into a :class:`_Mould`; adapters are cast from moulds. (Injecting an adapter
through PEFT takes time in proportion to all that are there already, and everybody who decodes waits for it.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from tuft_jupyter.engine import checkpoint
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.lora import Adapter, AdapterBank, MultiLoraLinear, Slot
from tuft_jupyter.engine.shelf import Shelf, identity

_MOULDS = 8  # geometries remembered


class _Mould:
    """The layers of one geometry, and where each one's A and B lie in a flat vector."""

    def __init__(self, adapter: Adapter, name: str, base: BaseModel) -> None:
        self.adapter = adapter
        modules = [module for module in base.hf.modules() if isinstance(module, MultiLoraLinear)]
        self.layers = [(module, module.slots[name]) for module in modules if name in module.slots]

    def cast(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Put an adapter with these weights, read-only and in the model's dtype, into the layers."""
        vector = torch.zeros_like(self.adapter.compute)
        for key, view in self.adapter.split(vector).items():
            view.copy_(weights[key])
        for module, slot in self.layers:
            a, b = (_same_place(vector, tensor) for tensor in (slot.a, slot.b))
            module.slots[name] = Slot(a, b, slot.scale, None, None)

    def melt(self, name: str) -> None:
        for module, _ in self.layers:
            del module.slots[name]


class AdapterCache:
    """Not for several threads: adapters go into the model that decodes."""

    def __init__(self, base: BaseModel, capacity: int) -> None:
        self._base = base
        self._bank = AdapterBank(base)
        self._moulds: OrderedDict[str, _Mould] = OrderedDict()  # least recently used first
        self._held: Shelf[tuple[str, _Mould]] = Shelf(capacity, lambda held: held[1].melt(held[0]))

    def take(self, directory: Path) -> str | None:
        """The name that the adapter of a directory has in the model, loaded if need be.

        None while there is no room. UserError if it is missing, damaged, or does not fit the base model.
        """
        name = identity(directory, checkpoint.WEIGHTS)
        if self._held.take(name) is None:
            if not self._held.make_room():
                return None
            saved = checkpoint.read(directory, self._base, optimizer=False)
            mould = self._mould(saved.config)
            saved.check_fits(mould.adapter)
            mould.cast(name, saved.weights)
            self._held.put(name, (name, mould))
        return name

    def give_back(self, name: str) -> None:
        """One use less; the adapter stays until room is needed."""
        self._held.give_back(name)

    def _mould(self, config: LoraConfig) -> _Mould:
        targets = config.target_modules
        modules = [targets] if isinstance(targets, str) else sorted(targets or ())
        key = f"rank {config.r}, alpha {config.lora_alpha}, {modules}"
        if key not in self._moulds:
            if len(self._moulds) >= _MOULDS:
                self._bank.remove(self._moulds.popitem(last=False)[0])
            self._moulds[key] = _Mould(self._bank.add(key, config, trainable=False), key, self._base)
        self._moulds.move_to_end(key)
        return self._moulds[key]


def _same_place(vector: Tensor, tensor: Tensor) -> Tensor:
    """The part of ``vector`` that lies where ``tensor`` lies in its own vector."""
    start = tensor.storage_offset()
    return vector[start : start + tensor.numel()].view(tensor.shape)
