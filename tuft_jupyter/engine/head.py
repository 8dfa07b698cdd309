"""The unembedding of packed rows: logits of chosen positions.

Shapes: M positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuft_jupyter.engine.lora import MultiLoraLinear
from tuft_jupyter.engine.packing import Segment


def logits(lm_head: nn.Module, h_MD: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """Logits [M, V] of hidden states, in the model's dtype; ``segments`` are of these M positions."""
    if not isinstance(lm_head, MultiLoraLinear):
        return F.linear(h_MD, lm_head.weight, lm_head.bias)
    base = lm_head.base_layer
    z_MV = F.linear(h_MD, base.weight, base.bias)
    for start, end, slot in lm_head.parts(segments):
        z_MV[start:end].addmm_(torch.mm(h_MD[start:end], slot.a.t()), slot.b.t(), alpha=slot.scale)
    return z_MV
