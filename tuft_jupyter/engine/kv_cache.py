"""Keys and values of the sequences that are being sampled, and attention over them.

Each live sequence has a slot; the live slots are always 0..n-1 (the last one moves into a hole), so attention
reads the cache in place and never gathers it. Storage follows what is needed, in doublings, per layer at the
first use of that layer; it is given back when the last sequence is gone.

A packed row's order is by adapter, the cache's order is by arrival: decoding carries the queries (a few kB)
from one to the other, not the cache. Knows nothing of adapters, requests or tokens.

Shapes: N tokens of the row, H query heads, G key/value heads, D head dimension, C slots, S positions, B slots
of one block, R query heads per key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft_jupyter.engine.attention import CausalAttention

_FIRST_POSITIONS = 128
_KEEP_BYTES = 64 << 20  # storage up to this size is not worth giving back
_CALL_COST = 256  # positions: about what one more attention call costs, in positions attended to in vain


class KVCache:
    """Storage in slots. ``lengths[slot]`` is how many positions of a live slot are filled."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions = _FIRST_POSITIONS

    def add(self, length: int) -> int:
        """A new slot for a sequence whose first ``length`` positions are about to be filled."""
        self.lengths.append(length)
        return len(self.lengths) - 1

    def drop(self, slot: int) -> int:
        """Free a slot. The sequence of the last slot, whose number is returned, now lives in ``slot``."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if slot != last:
            self.lengths[slot] = length
            for k_CGSD, v_CGSD in self._layers.values():
                k_CGSD[slot, :, :length] = k_CGSD[last, :, :length]
                v_CGSD[slot, :, :length] = v_CGSD[last, :, :length]
        if not self.lengths and self.bytes > _KEEP_BYTES:
            self._layers.clear()
            self._positions = _FIRST_POSITIONS
        return last

    @property
    def bytes(self) -> int:
        """Storage held."""
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())

    def layer(self, layer: int, k_1GND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [C, G, S, D] of a layer, large enough for every live slot and one more position."""
        held = self._layers.get(layer)
        needed = max(self.lengths) + 1
        if held is not None and held[0].shape[0] >= len(self.lengths) and held[0].shape[2] >= needed:
            return held
        while self._positions < needed:
            self._positions *= 2
        slots = 1 << (len(self.lengths) - 1).bit_length()
        shape = (slots, k_1GND.shape[1], self._positions, k_1GND.shape[3])
        # Zeros, not empty memory: what lies beyond a length is masked, and a NaN would pass through the mask.
        grown = (k_1GND.new_zeros(shape), k_1GND.new_zeros(shape))
        if held is not None:
            slots, positions = min(slots, held[0].shape[0]), held[0].shape[2]
            for new, old in zip(grown, held, strict=True):
                new[:slots, :, :positions] = old[:slots]
        self._layers[layer] = grown
        return grown


class PrefillAttention:
    """Prompts packed into a row attend to themselves; each one's keys and values go to all of its slots."""

    def __init__(
        self, cache: KVCache, cu: Sequence[int], slots: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self._cache, self._cu, self._slots = cache, cu, slots
        self._causal = CausalAttention(cu, device)

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        k_CGSD, v_CGSD = self._cache.layer(layer, k_1GND)
        for (start, end), slots in zip(pairwise(self._cu), self._slots, strict=True):
            for slot in slots:
                k_CGSD[slot, :, : end - start] = k_1GND[0, :, start:end]
                v_CGSD[slot, :, : end - start] = v_1GND[0, :, start:end]
        return self._causal(layer, q_1HND, k_1GND, v_1GND, scaling, window)


class DecodeAttention:
    """One token of every live sequence attends to that sequence's past; row i of the packed row is
    ``slots[i]``.

    Lives from one change of the live set to the next; :meth:`advance` goes from one position to the next.
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], device: torch.device) -> None:
        self._cache = cache
        self._slots_N = torch.tensor(slots, device=device)
        in_order = list(slots) == list(range(len(slots)))
        self._rows_C = None if in_order else torch.argsort(self._slots_N)
        self._positions_C = torch.tensor(cache.lengths, device=device)
        self.positions_N = self._positions_C[self._slots_N]
        self._blocks = blocks(cache.lengths)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def advance(self) -> None:
        """The row was attended to; the next one is one position further in every sequence."""
        self._positions_C += 1
        self.positions_N += 1
        self._cache.lengths = [length + 1 for length in self._cache.lengths]
        self._masks.clear()

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        k_CGSD, v_CGSD = self._cache.layer(layer, k_1GND)
        k_CGSD[self._slots_N, :, self.positions_N] = k_1GND[0].transpose(0, 1)
        v_CGSD[self._slots_N, :, self.positions_N] = v_1GND[0].transpose(0, 1)
        q_NHD = q_1HND[0].transpose(0, 1)
        if self._rows_C is not None:
            q_NHD = q_NHD.index_select(0, self._rows_C)
        # The query heads that share keys stand as R queries of one head: nothing has to be repeated.
        q_CGRD = q_NHD.unflatten(1, (k_CGSD.shape[1], -1))
        outputs = []
        for start, end in self._blocks:
            span = max(self._cache.lengths[start:end]) + 1
            outputs.append(
                F.scaled_dot_product_attention(
                    q_CGRD[start:end],
                    k_CGSD[start:end, :, :span],
                    v_CGSD[start:end, :, :span],
                    attn_mask=self._mask(start, end, span, window, q_CGRD.dtype),
                    scale=scaling,
                ).flatten(1, 2)
            )
        o_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._rows_C is not None:
            o_NHD = o_NHD.index_select(0, self._slots_N)
        return o_NHD[None]

    def _mask(self, start: int, end: int, span: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What the slots of a block may see of ``span`` positions, 0 or -inf [B, 1, 1, S]; None if all."""
        equal = min(self._cache.lengths[start:end]) + 1 == span
        if equal and (window is None or span <= window):
            return None
        if (start, window) not in self._masks:
            behind_BS = self._positions_C[start:end, None] - torch.arange(span, device=self._slots_N.device)
            seen_BS = behind_BS >= 0
            if window is not None:
                seen_BS &= behind_BS < window
            mask_BS = torch.zeros(seen_BS.shape, dtype=dtype, device=seen_BS.device)
            self._masks[start, window] = mask_BS.masked_fill_(~seen_BS, -torch.inf)[:, None, None, :]
        return self._masks[start, window]


def blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut slots into runs ``(start, end)`` that are cheap to attend to up to the longest of the run.

    A run goes on while the positions attended to in vain cost less than one more call would.
    """
    runs: list[tuple[int, int]] = []
    start, longest, filled = 0, 0, 0
    for slot, length in enumerate(lengths):
        wider = max(longest, length)
        if slot > start and wider * (slot + 1 - start) > (filled + length) * 1.25 + _CALL_COST:
            runs.append((start, slot))
            start, wider, filled = slot, length, 0
        longest, filled = wider, filled + length
    runs.append((start, len(lengths)))
    return runs
