"""Causal attention within the sequences of a packed row, for training.

Promises what :class:`~tuft_jupyter.engine.packing.Attention` asks for, differentiable; no sequence sees another.

Shapes: N tokens of the row, S sequences of T tokens each, H query heads, G key/value heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalAttention:
    """Each token sees its own sequence up to itself.

    On CPU, neighbouring sequences of equal length go through one call, others through one call each (a mask over the
    whole row would cost N x N). On CUDA, one variable-length kernel serves the row where it can (half precision),
    else the same calls as on CPU.
    """

    def __init__(self, cu: Sequence[int], device: torch.device) -> None:
        lengths = [end - start for start, end in pairwise(cu)]
        self._longest = max(lengths)
        self._runs: list[tuple[int, int, int]] = []  # (start, sequences, tokens of each)
        start = 0
        for length, group in groupby(lengths):
            count = len(list(group))
            self._runs.append((start, count, length))
            start += count * length
        self._cu = torch.tensor(cu, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        if self._cu is not None and q_1HND.dtype in (torch.float16, torch.bfloat16):
            return self._varlen(q_1HND, k_1GND, v_1GND, scaling, window)
        if len(self._runs) == 1:  # slices would cost a copy each in the backward pass
            return _attend(q_1HND, k_1GND, v_1GND, self._runs[0][1], scaling, window)
        outputs = []
        for start, count, length in self._runs:
            at = slice(start, start + count * length)
            outputs.append(
                _attend(q_1HND[:, :, at], k_1GND[:, :, at], v_1GND[:, :, at], count, scaling, window)
            )
        return torch.cat(outputs, dim=1)

    def _varlen(
        self, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q_NHD, k_NGD, v_NGD = (t[0].transpose(0, 1).contiguous() for t in (q_1HND, k_1GND, v_1GND))
        o_NHD = varlen_attn(
            q_NHD,
            k_NGD,
            v_NGD,
            self._cu,  # type: ignore[arg-type]
            self._cu,
            self._longest,
            self._longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q_NHD.shape[1] != k_NGD.shape[1],
        )
        assert isinstance(o_NHD, Tensor)
        return o_NHD[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, count: int, scaling: float | None, window: int | None) -> Tensor:
    """``count`` neighbouring sequences of T tokens: [1, H, S * T, D] to [1, S * T, H, D]."""
    if count > 1:
        q, k, v = (t[0].unflatten(1, (count, -1)).transpose(0, 1) for t in (q, k, v))
    length = q.shape[2]
    mask = None
    if window is not None and window < length:
        at = torch.arange(length, device=q.device)
        behind = at[:, None] - at[None, :]
        mask = (behind >= 0) & (behind < window)
    o_SHTD = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    o_STHD = o_SHTD.transpose(1, 2)
    return o_STHD if count == 1 else o_STHD.flatten(0, 1)[None]
