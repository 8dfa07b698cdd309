"""Causal attention within the sequences of a packed row, for training.

Promises what :class:`~tuft_jupyter.engine.packing.Attention` asks for, differentiable; no sequence sees another.

Shapes: N tokens of the row, S sequences of T tokens each, H query heads, G key/value heads with R = H / G query
heads each, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_BLOCK = 64
# Sequence lengths for which matmuls by blocks of queries take up to a third less time than the CPU's flash kernel, and
# the probabilities they keep for the backward pass are still small beside the other activations.
_BLOCKED = range(1, 513)

_BENT = 256
"""Queries of a block where no kernel knows what is made of the scores."""

_AHEAD = torch.full((_BLOCK, _BLOCK), -torch.inf).triu(1)

Back = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the gradient of what was attended, [1, N, H, D], to those of queries, keys and values as they were given."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What becomes of queries times keys before they weigh the values.

    ``scaling`` None means ``D ** -0.5``. ``window`` W lets a token see itself and the W - 1 before it; None means all
    before it. ``softcap`` C makes C * tanh(x / C) of a score x (Gemma 2). ``sinks`` [H] stand in each head's softmax
    as the score of one key more, whose value is 0 (gpt-oss).
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def bent(self) -> bool:
        """Whether no kernel computes this."""
        return self.softcap is not None or self.sinks is not None

    def scale(self, size: int) -> float:
        return size**-0.5 if self.scaling is None else self.scaling

    def weights(self, scores_XRS: Tensor, unseen: Tensor | None, groups: int) -> Tensor:
        """The softmax [X, R, S], in fp32, of scaled products; ``unseen`` is added to them, 0 or -inf.

        X runs over sequences and, within each, over the G heads of keys; R over their queries, by head and token.
        """
        scores_XRS = scores_XRS.float()
        if self.softcap is not None:
            scores_XRS = torch.tanh(scores_XRS / self.softcap) * self.softcap
        if unseen is not None:
            scores_XRS = scores_XRS + unseen
        if self.sinks is None:
            return torch.softmax(scores_XRS, -1)
        each = scores_XRS.shape[1] * groups // len(self.sinks)  # tokens
        sinks_GR = self.sinks.view(groups, -1).repeat_interleave(each, 1).float()
        sinks_XR1 = sinks_GR.repeat(len(scores_XRS) // groups, 1)[..., None]
        return torch.softmax(torch.cat([scores_XRS, sinks_XR1], -1), -1)[..., :-1]


class CausalAttention:
    """Each token sees its own sequence up to itself.

    On CPU, neighbouring sequences of equal length go through one call, others through one call each (a mask over the
    whole row would cost N x N). On CUDA, one variable-length kernel serves the row where it can (half precision, on
    Ampere and later), else the same calls as on CPU.
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
        self._cu = torch.tensor(cu, dtype=torch.int32, device=device) if _has_kernel(device) else None

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scores: Scores,
    ) -> Tensor:
        if scores.bent:
            each = [slice(start, end) for start, end in self._sequences()]
            bent = [attend_bent(q_1HND[:, :, at], k_1GND[:, :, at], v_1GND[:, :, at], scores) for at in each]
            return torch.cat(bent, dim=1)
        scaling, window = scores.scaling, scores.window
        kernel = None if self._cu is None else _varlen_kernel()
        if kernel is not None and _takes(q_1HND):
            q_NHD, k_NGD, v_NGD = (t[0].transpose(0, 1).contiguous() for t in (q_1HND, k_1GND, v_1GND))
            return kernel(q_NHD, k_NGD, v_NGD, self._cu, self._longest, scaling, window)[None]
        dtype = q_1HND.dtype
        if q_1HND.device.type == "cpu" and dtype != torch.float32 and self._longest < _BLOCKED.stop:
            # The CPU's half-precision kernel takes twice as long, most of all backward.
            q_1HND, k_1GND, v_1GND = q_1HND.float(), k_1GND.float(), v_1GND.float()
        return self._within(q_1HND, k_1GND, v_1GND, scaling, window).to(dtype)

    def taped(self, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, scaling: float) -> tuple[Tensor, Back]:
        """The same, and the way back; for who does not use autograd. Each sequence's gradients are written once."""
        if q_1HND.device.type != "cpu" or self._longest >= _BLOCKED.stop:
            return self._by_autograd(q_1HND, k_1GND, v_1GND, scaling)
        dtype = q_1HND.dtype
        q_HND, k_GND, v_GND = (t[0].float() for t in (q_1HND, k_1GND, v_1GND))
        o_NHD = q_HND.new_empty(q_HND.shape[1], q_HND.shape[0], q_HND.shape[2])
        q_GRND = torch.mul(q_HND.unflatten(0, (len(k_GND), -1)), scaling)
        kept = [
            _attend_blocks(q_GRND, k_GND, v_GND, o_NHD, blocks)
            for blocks in map(_sequence, self._sequences())
        ]

        def back(do_1NHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            do_GRND = _grouped(do_1NHD[0].float(), len(k_GND))
            grads = tuple(torch.empty(t.shape, device=t.device) for t in (q_GRND, k_GND, v_GND))
            for sequence, p in zip(self._sequences(), kept, strict=True):
                _pull_blocks(do_GRND, q_GRND, k_GND, v_GND, p, grads, _sequence(sequence))
            dq, dk, dv = grads
            return dq.mul_(scaling).flatten(0, 1)[None].to(dtype), dk[None].to(dtype), dv[None].to(dtype)

        return o_NHD[None].to(dtype), back

    def _by_autograd(
        self, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, scaling: float
    ) -> tuple[Tensor, Back]:
        inputs = [t.detach().requires_grad_() for t in (q_1HND, k_1GND, v_1GND)]
        with torch.enable_grad():
            o_1NHD = self(0, inputs[0], inputs[1], inputs[2], Scores(scaling))

        def back(do_1NHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = torch.autograd.grad(o_1NHD, inputs, do_1NHD)
            return dq, dk, dv

        return o_1NHD.detach(), back

    def _sequences(self) -> Iterator[tuple[int, int]]:
        """Start and end of each."""
        for start, count, length in self._runs:
            for at in range(start, start + count * length, length):
                yield at, at + length

    def _within(
        self, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if len(self._runs) == 1:  # slices would cost a copy each in the backward pass
            return _attend(q_1HND, k_1GND, v_1GND, self._runs[0][1], scaling, window)
        outputs = []
        for start, count, length in self._runs:
            at = slice(start, start + count * length)
            outputs.append(
                _attend(q_1HND[:, :, at], k_1GND[:, :, at], v_1GND[:, :, at], count, scaling, window)
            )
        return torch.cat(outputs, dim=1)


def attend_bent(q_1HTD: Tensor, k_1GSD: Tensor, v_1GSD: Tensor, scores: Scores) -> Tensor:
    """The last T of S positions attend to all before them, with scores of any kind: [1, T, H, D].

    A block of queries at a time, whose scores are computed again on the way back: no more than a block's are held.
    """
    tokens, done = q_1HTD.shape[2], k_1GSD.shape[2] - q_1HTD.shape[2]
    blocks = []
    for start in range(0, tokens, _BENT):
        end = min(start + _BENT, tokens)
        first = 0 if scores.window is None else max(0, done + start + 1 - scores.window)
        seen = slice(first, done + end)
        block = q_1HTD[0, :, start:end], k_1GSD[0, :, seen], v_1GSD[0, :, seen]
        if torch.is_grad_enabled():
            blocks.append(
                checkpoint(_bent_block, *block, scores, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            blocks.append(_bent_block(*block, scores))
    return torch.cat(blocks)[None]


def _bent_block(q_HTD: Tensor, k_GSD: Tensor, v_GSD: Tensor, scores: Scores) -> Tensor:
    """[T, H, D]; see :func:`attend_bent`."""
    (tokens, size), (groups, seen) = q_HTD.shape[1:], k_GSD.shape[:2]
    at = torch.arange(seen, device=q_HTD.device)
    behind_TS = at[seen - tokens :, None] - at
    unseen_TS = behind_TS < 0
    if scores.window is not None:
        unseen_TS |= behind_TS >= scores.window
    mask_TS = torch.zeros(unseen_TS.shape, dtype=q_HTD.dtype, device=q_HTD.device)
    mask_TS.masked_fill_(unseen_TS, -torch.inf)
    q_GXD = (q_HTD * scores.scale(size)).unflatten(0, (groups, -1)).flatten(1, 2)
    products_GXS = torch.bmm(q_GXD, k_GSD.transpose(1, 2))
    mask_XS = mask_TS.repeat(products_GXS.shape[1] // tokens, 1)
    o_GXD = torch.bmm(scores.weights(products_GXS, mask_XS, groups).to(v_GSD.dtype), v_GSD)
    return o_GXD.view(-1, tokens, size).transpose(0, 1)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, float | None, int | None], Tensor]


@cache
def _varlen_kernel() -> Kernel | None:
    """Causal attention over a row [N, H, D] by one kernel, if this torch has it; what it takes differs by version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    knows = inspect.signature(varlen_attn).parameters

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu: Tensor | None,
        longest: int,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        more: dict[str, Any] = {}
        if scaling is not None and "scale" in knows:
            more["scale"] = scaling
        elif scaling is not None:
            q = q * (scaling * q.shape[-1] ** 0.5)
        more["window_size"] = (-1 if window is None else window - 1, 0)
        if q.shape[1] != k.shape[1] and "enable_gqa" in knows:
            more["enable_gqa"] = True
        elif q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        out = varlen_attn(q, k, v, cu, cu, longest, longest, **more)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return kernel if "window_size" in knows else None


def _has_kernel(device: torch.device) -> bool:
    """Whether the kernel, which is FlashAttention's, runs on this device; on GPUs before Ampere it raises."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _takes(q_1HND: Tensor) -> bool:
    """Whether the kernel takes queries like these."""
    return (
        q_1HND.dtype in (torch.float16, torch.bfloat16)
        and q_1HND.shape[-1] % 8 == 0
        and q_1HND.shape[-1] <= 256
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, count: int, scaling: float | None, window: int | None) -> Tensor:
    """``count`` neighbouring sequences of T tokens: [1, H, S * T, D] to [1, S * T, H, D]."""
    length = q.shape[2] // count
    mask = None
    if window is not None and window < length:
        at = torch.arange(length, device=q.device)
        behind = at[:, None] - at[None, :]
        mask = (behind >= 0) & (behind < window)
    elif length in _BLOCKED and q.device.type == "cpu" and q.dtype == torch.float32:
        o_1NHD: Tensor = _Blocks.apply(q, k, v, count, q.shape[-1] ** -0.5 if scaling is None else scaling)
        return o_1NHD
    if count > 1:
        q, k, v = (t[0].unflatten(1, (count, -1)).transpose(0, 1) for t in (q, k, v))
    o_SHTD = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    o_STHD = o_SHTD.transpose(1, 2)
    return o_STHD if count == 1 else o_STHD.flatten(0, 1)[None]


class _Blocks(torch.autograd.Function):
    """Causal attention one block of queries at a time, each against the keys up to its end."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, count: int, scaling: float
    ) -> Tensor:
        (heads, tokens, size), groups = q_1HND.shape[1:], k_1GND.shape[1]
        q_GRND = torch.mul(q_1HND[0].unflatten(0, (groups, -1)), scaling)
        k_GND, v_GND = k_1GND[0], v_1GND[0]
        o_NHD = q_1HND.new_empty(tokens, heads, size)
        kept = []
        for blocks in _blocks(tokens, count):
            kept += _attend_blocks(q_GRND, k_GND, v_GND, o_NHD, blocks)
        ctx.save_for_backward(q_GRND, k_GND, v_GND, *kept)
        ctx.count, ctx.scaling = count, scaling
        return o_NHD[None]

    @staticmethod
    def backward(ctx: Any, do_1NHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q_GRND, k_GND, v_GND, *kept = ctx.saved_tensors
        do_GRND = _grouped(do_1NHD[0], len(k_GND))
        grads = torch.empty_like(q_GRND), torch.empty_like(k_GND), torch.empty_like(v_GND)
        for blocks in _blocks(q_GRND.shape[2], ctx.count):
            _pull_blocks(do_GRND, q_GRND, k_GND, v_GND, kept[: len(blocks)], grads, blocks)
            del kept[: len(blocks)]
        dq_GRND, dk_GND, dv_GND = grads
        return dq_GRND.mul_(ctx.scaling).flatten(0, 1)[None], dk_GND[None], dv_GND[None], None, None


Block = tuple[slice, slice]
"""A block of queries of a sequence: the keys it sees, and its own positions."""


def _attend_blocks(
    q_GRND: Tensor, k_GND: Tensor, v_GND: Tensor, o_NHD: Tensor, blocks: Sequence[Block]
) -> list[Tensor]:
    """One sequence, into ``o_NHD``; queries are scaled already. Returns the probabilities of each block."""
    o_GRND, kept = _grouped(o_NHD, len(k_GND)), []
    for keys, block in blocks:
        n = block.stop - block.start
        scores = torch.bmm(q_GRND[:, :, block].flatten(1, 2), k_GND[:, keys].transpose(1, 2))
        scores.unflatten(1, (-1, n))[..., -n:].add_(_AHEAD[:n, :n])
        p = torch.softmax(scores, -1)
        o_GRND[:, :, block] = torch.bmm(p, v_GND[:, keys]).unflatten(1, (-1, n))
        kept.append(p)
    return kept


def _pull_blocks(
    do_GRND: Tensor,
    q_GRND: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    blocks: Sequence[Block],
) -> None:
    """The way back of one sequence: written into ``grads`` of (scaled) queries, keys and values."""
    dq_GRND, dk_GND, dv_GND = grads
    for (keys, block), p in reversed(list(zip(blocks, kept, strict=True))):
        d, q = do_GRND[:, :, block].flatten(1, 2), q_GRND[:, :, block].flatten(1, 2)
        dp = torch.bmm(d, v_GND[:, keys].transpose(1, 2))
        dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dq_GRND[:, :, block] = torch.bmm(dscores, k_GND[:, keys]).unflatten(1, (-1, block.stop - block.start))
        if block is blocks[-1][1]:  # it sees all keys of the sequence: what the others see is added to that
            dv_GND[:, keys] = torch.bmm(p.transpose(1, 2), d)
            dk_GND[:, keys] = torch.bmm(dscores.transpose(1, 2), q)
        else:
            dv_GND[:, keys].baddbmm_(p.transpose(1, 2), d)
            dk_GND[:, keys].baddbmm_(dscores.transpose(1, 2), q)


def _grouped(t_NHD: Tensor, groups: int) -> Tensor:
    """[N, G * R, D] to [G, R, N, D], a view."""
    return t_NHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _blocks(tokens: int, count: int) -> Iterator[list[Block]]:
    """The blocks of each of ``count`` sequences of equal length."""
    length = tokens // count
    for start in range(0, tokens, length):
        yield _sequence((start, start + length))


def _sequence(edges: tuple[int, int]) -> list[Block]:
    start, end = edges
    return [
        (slice(start, min(at + _BLOCK, end)), slice(at, min(at + _BLOCK, end)))
        for at in range(start, end, _BLOCK)
    ]
