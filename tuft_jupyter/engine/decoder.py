"""Running everything before the unembedding over a packed row, forward and back.

Two ways with one signature. :class:`ModuleDecoder` calls the Hugging Face modules under autograd and serves
any family whose attention goes through the packed interface; :class:`~tuft_jupyter.engine.llama.LlamaDecoder`
serves the common shape in less time. Which one a model gets is decided, and checked, when it is loaded.

Shapes: N tokens of the row, D hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tuft_jupyter.engine.llama import Pull
from tuft_jupyter.engine.packing import Packed, current


class Decoder(Protocol):
    def __call__(
        self, packed: Packed, ids_N: Tensor, positions_1N: Tensor, *, backward: bool, recompute: bool = False
    ) -> tuple[Tensor, Pull]:
        """Hidden states [N, D] after the last norm, and a function to call with their gradient [N, D].

        That function adds the gradients of every adapter of the row to its accumulator; it may be called
        once, and only with ``backward``. It may be told which rows of the gradient are not 0. With ``recompute``
        only the inputs of layers are kept until then: the same numbers in less memory and a third more time.
        """


class ModuleDecoder:
    """The model's own modules, their linear layers wrapped by PEFT."""

    def __init__(self, hf: PreTrainedModel) -> None:
        self._decoder = hf.base_model
        self._layers = [m for m in hf.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self._layers:
            enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "context_fn": _same_row})

    def __call__(
        self, packed: Packed, ids_N: Tensor, positions_1N: Tensor, *, backward: bool, recompute: bool = False
    ) -> tuple[Tensor, Pull]:
        for layer in self._layers:  # transformers asks this flag; its dropouts ask their own, which stay off
            layer.training = backward and recompute
        with packed.active(), torch.set_grad_enabled(backward):
            out = self._decoder(input_ids=ids_N[None], position_ids=positions_1N, use_cache=False)
        hidden_1ND: Tensor = out.last_hidden_state

        def pull(dh_ND: Tensor, rows_M: Tensor | None = None) -> None:
            if hidden_1ND.requires_grad:  # not if adapters are on the unembedding alone
                torch.autograd.backward(hidden_1ND, dh_ND[None])

        return hidden_1ND.detach()[0], pull


def _same_row() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A layer that is computed again sees the row it saw first, also in autograd's own thread."""
    packed = current()
    assert packed is not None
    return nullcontext(), packed.active()
