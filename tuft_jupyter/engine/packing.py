"""Sequences packed into one row without padding, and how a Hugging Face model is run over such a row.

The contract. A :class:`Packed` describes one flat row of N tokens: where each sequence ends, which adapter
each stretch of tokens belongs to, and how to attend. Inside ``with packed.active():`` a model loaded by
:mod:`~tuft_jupyter.engine.base` may be called as ``model(input_ids=[1, N], position_ids=[1, N],
use_cache=False)``. Its linear layers (:mod:`~tuft_jupyter.engine.lora`) then apply to every token the adapter
of its segment, and each attention layer calls ``packed.attention(layer, q, k, v, scores)``. Training
attends within each sequence (:mod:`~tuft_jupyter.engine.attention`); a sampler brings an object that also
owns a KV cache. Which packed row is active is a fact of the thread, not of the process.

Nothing here knows losses, gradients, requests or tenants. Promises: no sequence sees another, no token is
padded, and a call outside of ``active()`` fails instead of computing something else.

Shapes: N tokens of the row, H query heads, G key/value heads, D head dimension, S sequences, T tokens of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tuft_jupyter.engine.attention import CausalAttention, Scores

ATTENTION = "tuft_packed"

LOCAL = "local"
"""In a row's ``memo``: the windows (or chunks) of the masks that a model asked for on its way over the row."""

Segment = tuple[int, int, str | None]
"""``(start, end, adapter)``.

Tokens [start, end) of the row belong to that adapter, None is the bare base model.
"""


class Attention(Protocol):
    """How the tokens of a packed row attend in one layer."""

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scores: Scores,
    ) -> Tensor:
        """Attended values, shape [1, N, H, D]; queries and keys are already rotated."""


_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Packed:
    """One flat row: ``cu`` are the S + 1 sequence boundaries, ``segments`` cover [0, N) in order.

    ``memo`` is for layers: what they worked out about the row, if it is run more than once.
    """

    cu: tuple[int, ...]
    segments: tuple[Segment, ...]
    attention: Attention
    memo: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        return self.cu[-1]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the row that layers called from this thread work on."""
        before = current()
        _thread.packed = self
        try:
            yield
        finally:
            _thread.packed = before


def current() -> Packed | None:
    """The row active in this thread."""
    return getattr(_thread, "packed", None)


def boundaries(lengths: Sequence[int]) -> tuple[int, ...]:
    """``(0, l0, l0 + l1, ...)``."""
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    return tuple(cu)


def segments_of(lengths: Sequence[int], adapters: Sequence[str | None]) -> tuple[Segment, ...]:
    """Segments of a row whose sequence i has ``lengths[i]`` tokens and adapter ``adapters[i]``."""
    segments: list[Segment] = []
    start = 0
    for adapter, group in groupby(zip(adapters, lengths, strict=True), key=lambda pair: pair[0]):
        end = start + sum(length for _, length in group)
        segments.append((start, end, adapter))
        start = end
    return tuple(segments)


def positions(cu: Sequence[int], device: torch.device) -> Tensor:
    """Position ids [1, N]: each sequence counts from 0."""
    return torch.cat([torch.arange(end - start) for start, end in pairwise(cu)])[None].to(device)


def causal(lengths: Sequence[int], adapters: Sequence[str | None], device: torch.device) -> Packed:
    """The row of a training pass: sequences of these lengths and adapters, each seeing itself only."""
    cu = boundaries(lengths)
    return Packed(cu, segments_of(lengths, adapters), CausalAttention(cu, device))


def micro_batches(lengths: Sequence[int], adapters: Sequence[str | None], budget: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most ``budget`` tokens (a longer row stands alone).

    Returns indices into ``lengths``. Each adapter's rows, longest first, are cut by themselves, and its
    pieces keep their order, so the sums of its gradients do not depend on who else is there; pieces of several
    adapters then share micro-batches where they fit. Within a micro-batch each adapter is one segment and equal
    lengths are neighbours.
    """
    order = sorted(range(len(lengths)), key=lambda i: (adapters[i] or "", -lengths[i], i))
    pieces: list[tuple[int, list[int]]] = []
    for _, group in groupby(order, key=lambda i: adapters[i]):
        size, piece = 0, list[int]()
        for i in group:
            if piece and size + lengths[i] > budget:
                pieces.append((size, piece))
                size, piece = 0, []
            size, piece = size + lengths[i], [*piece, i]
        pieces.append((size, piece))
    batches: list[list[int]] = []
    room: list[int] = []
    last: dict[str | None, int] = {}
    for size, piece in sorted(pieces, key=lambda p: -p[0]):
        adapter = adapters[piece[0]]
        after = range(last.get(adapter, -1) + 1, len(batches))
        at = next((b for b in after if size <= room[b]), len(batches))
        if at == len(batches):
            batches.append([])
            room.append(budget)
        batches[at] += piece
        room[at] -= size
        last[adapter] = at
    return batches


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    packed = current()
    if packed is None:
        raise RuntimeError("a packed model was called outside of Packed.active()")
    if value.shape[-1] != key.shape[-1]:
        raise RuntimeError("its values have another size than its keys")
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    return packed.attention(module.layer_idx, query, key, value, scores), None  # type: ignore[arg-type]


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
    """None: whoever attends knows what is seen, and of a window from the layers."""
    packed = current()
    if packed is not None and local_size:
        packed.memo.setdefault(LOCAL, set()).add(local_size)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
