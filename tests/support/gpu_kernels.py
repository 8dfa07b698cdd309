"""What a GPU's own kernels ask of their inputs, and compute: for :mod:`tests.support.pretend_gpu`.

The checks are those of torch's C++ sources (mha_varlen_fwd and mha_varlen_bwd, GroupedMMUtils.h).

Shapes: N tokens of the row, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen  # noqa: F401 - registers its operations

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def _flash(capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> None:
    """What FlashAttention asks for (mha_varlen_fwd and mha_varlen_bwd)."""
    if capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    for t in (q, k, v):
        assert t.dtype in _HALF, f"FlashAttention only support fp16 and bf16 data type, not {t.dtype}"
        assert t.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert t.shape[-1] in range(8, 257, 8), f"a head of {t.shape[-1]}"
    assert cu.dtype == torch.int32, f"cu_seqlens must have dtype int32, not {cu.dtype}"


def _sequences(cu: Tensor, longest: int, window: list[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Of each sequence which keys its queries see, and the tensors' parts in fp32, heads first."""
    edges = cu.tolist()
    assert longest == max(b - a for a, b in pairwise(edges)), f"max_seqlen is not {longest}"
    assert window[1] == 0, "only what is causal"
    heads = tensors[0].shape[1]
    for start, end in pairwise(edges):
        at = torch.arange(end - start)
        behind = at[:, None] - at
        seen = (behind >= 0) & (behind <= (window[0] if window[0] >= 0 else end))
        parts = (t[start:end].float().repeat_interleave(heads // t.shape[1], 1) for t in tensors)
        yield seen, *(part.transpose(0, 1) for part in parts)


def _weights(seen: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.softmax((q @ k.mT * scale).masked_fill(~seen, -torch.inf), -1)


def _varlen(
    capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float | None, window: list[int], *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _flash(capability, q, k, v, cu)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = [_weights(s, q1, k1, scale) @ v1 for s, q1, k1, v1 in _sequences(cu, max_q, window, q, k, v)]
    out = torch.cat(found, 1).transpose(0, 1).to(q.dtype).contiguous()
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _varlen_back(
    capability: tuple[int, int], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, causal: bool, rng: Tensor, scale: float | None, window: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    _flash(capability, q, k, v, cu)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for seen, q1, k1, v1, do in _sequences(cu, max_q, window, q, k, v, dout):
        p, dp = _weights(seen, q1, k1, scale), do @ v1.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for grad, of in zip(grads, (ds @ k1, ds.mT @ q1, p.mT @ do), strict=True):
            grad.append(of)
    whole = (torch.cat(grad, 1).transpose(0, 1) for grad in grads)  # [N, H, D]
    return tuple(
        g.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
        for g, like in zip(whole, (q, k, v), strict=True)
    )


def _grouped(capability: tuple[int, int], a: Tensor, b: Tensor, offs: Tensor, *rest: Any) -> Tensor:
    """What is checked on a GPU only."""
    for t in (a, b):
        assert t.data_ptr() % 16 == 0, "expected data_ptr to be aligned to 16 bytes"
    return _aten._grouped_mm.default(a, b, offs, *rest)


KERNELS: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_back,
    "aten::_grouped_mm": _grouped,
    "aten::histc": lambda _, counted, *rest: _aten.histc.default(counted.float(), *rest).to(counted.dtype),
}
"""Operations that only a GPU has, or has for more types, or that ask more of their inputs there."""
