"""Keys and values of the sequences that are being sampled, and attention over them.

A prompt that is being run lies in a :class:`Strip` of its own length. A sequence that is decoded has a
:class:`Place` in a bucket: slots of one size, the live ones always 0..n-1 (the last one moves into a hole), so that
attention reads a bucket in place and never gathers it. A sequence that outgrows its bucket moves to the next size.
Within a bucket lengths differ little, so one matmul over all of its slots wastes little.

``budget`` bounds the positions held, all together; who asks for more is told no and has to wait. Knows nothing of
adapters, requests or tokens.

Shapes: N tokens of the row, H query heads, G key/value heads, D head dimension, P positions of a strip, C slots of
a bucket, S positions of each, R query heads per key/value head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tuft_jupyter.engine import fused
from tuft_jupyter.engine.attention import CausalAttention, Scores, attend_bent

SMALLEST = 128  # positions of a slot
MINIMUM = 512  # of a budget: the smallest slots and a short prompt
_KEEP_BYTES = 64 << 20  # an empty bucket up to this size is not worth giving back

Layers = dict[int, tuple[Tensor, Tensor]]


def slot_size(length: int) -> int:
    """Positions of the smallest slot that takes ``length``: 128, 192, 256, 384, 512 and so on."""
    size = SMALLEST
    while size < length:
        size *= 2
    smaller = size * 3 // 4
    return smaller if length <= smaller and size > SMALLEST else size


@dataclass(slots=True, eq=False)
class Strip:
    """Keys and values [G, P, D] of a prompt, the first ``done`` positions filled."""

    positions: int
    done: int = 0
    layers: Layers = field(default_factory=dict)

    def layer(self, layer: int, k_1GND: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            shape = (k_1GND.shape[1], self.positions, k_1GND.shape[3])
            self.layers[layer] = (k_1GND.new_empty(shape), k_1GND.new_empty(shape))
        return self.layers[layer]


@dataclass(slots=True, eq=False)
class Place:
    """Where a live sequence is; ``length`` positions of it are filled."""

    bucket: Bucket
    slot: int
    length: int

    @property
    def full(self) -> bool:
        return self.length >= self.bucket.size


@dataclass(slots=True, eq=False)
class Bucket:
    """Slots of ``size`` positions; ``places[slot]`` is who is there."""

    size: int
    places: list[Place] = field(default_factory=list)
    layers: Layers = field(default_factory=dict)  # [C, G, S, D]

    @property
    def slots(self) -> int:
        """For how many sequences there is storage."""
        return next((len(k) for k, _ in self.layers.values()), 0)

    def resize(self, slots: int) -> None:
        for layer, (k_CGSD, v_CGSD) in self.layers.items():
            self.layers[layer] = (_resized(k_CGSD, slots), _resized(v_CGSD, slots))


def _resized(old_CGSD: Tensor, slots: int) -> Tensor:
    # Zeros, not empty memory: what lies beyond a length is masked, and a NaN would pass through the mask.
    new_CGSD = old_CGSD.new_zeros(slots, *old_CGSD.shape[1:])
    kept = min(slots, len(old_CGSD))
    new_CGSD[:kept] = old_CGSD[:kept]
    return new_CGSD


class KVCache:
    """``budget`` positions at most, None for no bound. What is taken is given back by whoever took it."""

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None and budget < MINIMUM:
            raise ValueError(f"a KV cache holds at least {MINIMUM} tokens, got {budget}")
        self.budget = budget
        self.taken = 0
        self.buckets: dict[int, Bucket] = {}

    @property
    def longest(self) -> int:
        """Positions that one sequence may come to.

        While it is carried from its strip, or from its slot, to the next larger one, both are held.
        """
        return sys.maxsize if self.budget is None else self.budget * 2 // 5

    def take(self, positions: int) -> bool:
        """Set positions aside; False, and nothing taken, if there are not that many."""
        if self.budget is not None and self.taken + positions > self.budget:
            return False
        self.taken += positions
        return True

    def give(self, positions: int) -> None:
        self.taken -= positions

    @property
    def bytes(self) -> int:
        """Storage of the buckets."""
        return sum(k.nbytes + v.nbytes for bucket in self.buckets.values() for k, v in bucket.layers.values())

    def begin(self, strip: Strip) -> Place:
        """A place for one more sequence that begins with a strip; ``slot_size(done + 1)`` must have been taken."""
        return self._put(slot_size(strip.done + 1), strip.done, strip.layers)

    def move(self, place: Place, size: int) -> None:
        """Carry a sequence to a slot of another size, for which ``size`` must have been taken."""
        old, slot = place.bucket, place.slot
        moved = self._put(size, place.length, {at: (k[slot], v[slot]) for at, (k, v) in old.layers.items()})
        self.drop(place)
        place.bucket, place.slot = moved.bucket, moved.slot
        moved.bucket.places[moved.slot] = place

    def drop(self, place: Place) -> None:
        """Free a place and give back what was taken for it."""
        bucket, last = place.bucket, place.bucket.places.pop()
        if last is not place:
            for k_CGSD, v_CGSD in bucket.layers.values():
                k_CGSD[place.slot] = k_CGSD[last.slot]
                v_CGSD[place.slot] = v_CGSD[last.slot]
            bucket.places[place.slot] = last
            last.slot = place.slot
        self.give(bucket.size)
        if not bucket.places and sum(k.nbytes + v.nbytes for k, v in bucket.layers.values()) > _KEEP_BYTES:
            del self.buckets[bucket.size]

    def _put(self, size: int, length: int, layers: Layers) -> Place:
        bucket = self.buckets.setdefault(size, Bucket(size))
        place = Place(bucket, len(bucket.places), length)
        bucket.places.append(place)
        if layers and len(bucket.places) > bucket.slots:
            self._widen(bucket, layers)
        for layer, pair in layers.items():
            for storage_CGSD, filled_GPD in zip(bucket.layers[layer], pair, strict=True):
                storage_CGSD[place.slot, :, :length] = filled_GPD[:, :length]
                storage_CGSD[place.slot, :, length:] = 0  # who was here before may have left NaN
        return place

    def _widen(self, bucket: Bucket, like: Layers) -> None:
        """Storage for everybody in a bucket and, if the budget allows, for as many again."""
        needed = len(bucket.places)
        wanted = 1 << (needed - 1).bit_length()
        if self.budget is not None:
            held = sum(other.slots * other.size for other in self.buckets.values() if other is not bucket)
            if held + wanted * bucket.size > self.budget:
                self._trim(bucket)
                wanted = max(needed, min(wanted, needed + (self.budget - self.taken) // bucket.size))
        if not bucket.layers:
            for layer, (k_GPD, v_GPD) in like.items():
                k_shape, v_shape = ((0, t.shape[0], bucket.size, t.shape[2]) for t in (k_GPD, v_GPD))
                bucket.layers[layer] = (k_GPD.new_zeros(k_shape), v_GPD.new_zeros(v_shape))
        bucket.resize(wanted)

    def _trim(self, needy: Bucket) -> None:
        """Take from the other buckets what stands empty."""
        for bucket in list(self.buckets.values()):
            if not bucket.places:
                del self.buckets[bucket.size]
            elif bucket is not needy and bucket.slots > len(bucket.places):
                bucket.resize(len(bucket.places))


class PrefillAttention:
    """Pieces of prompts packed into a row: each attends to itself and to what lies in its strip already."""

    def __init__(self, strips: Sequence[Strip], cu: Sequence[int], device: torch.device) -> None:
        self._strips, self._cu = strips, cu
        self._runs: list[
            tuple[slice, CausalAttention | Strip]
        ] = []  # neighbours that begin share their calls
        for fresh, group in groupby(range(len(strips)), key=lambda i: strips[i].done == 0):
            members = list(group)
            if fresh:
                first, last = members[0], members[-1] + 1
                edges = [edge - cu[first] for edge in cu[first : last + 1]]
                self._runs.append((slice(cu[first], cu[last]), CausalAttention(edges, device)))
            else:
                self._runs += [(slice(cu[i], cu[i + 1]), strips[i]) for i in members]

    def advance(self) -> None:
        """The row was run through every layer."""
        for strip, (start, end) in zip(self._strips, pairwise(self._cu), strict=True):
            strip.done += end - start

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scores: Scores,
    ) -> Tensor:
        for strip, (start, end) in zip(self._strips, pairwise(self._cu), strict=True):
            k_GPD, v_GPD = strip.layer(layer, k_1GND)
            k_GPD[:, strip.done : strip.done + end - start] = k_1GND[0, :, start:end]
            v_GPD[:, strip.done : strip.done + end - start] = v_1GND[0, :, start:end]
        outputs = []
        for at, how in self._runs:
            q_1HTD = q_1HND[:, :, at]
            if isinstance(how, Strip):
                outputs.append(_behind(q_1HTD, how, layer, scores))
            else:
                outputs.append(how(layer, q_1HTD, k_1GND[:, :, at], v_1GND[:, :, at], scores))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _behind(q_1HTD: Tensor, strip: Strip, layer: int, scores: Scores) -> Tensor:
    """The piece of a prompt that follows the ``done`` positions of its strip, [1, T, H, D]."""
    end = strip.done + q_1HTD.shape[2]
    k_GPD, v_GPD = strip.layers[layer]
    if scores.bent:
        return attend_bent(q_1HTD, k_GPD[None, :, :end], v_GPD[None, :, :end], scores)
    at = torch.arange(end, device=q_1HTD.device)
    distance_TS = at[strip.done :, None] - at
    seen_TS = distance_TS >= 0
    if scores.window is not None:
        seen_TS &= distance_TS < scores.window
    o_1HTD = F.scaled_dot_product_attention(
        q_1HTD,
        k_GPD[None, :, :end],
        v_GPD[None, :, :end],
        attn_mask=seen_TS,
        scale=scores.scaling,
        enable_gqa=q_1HTD.shape[1] != len(k_GPD),
    )
    return o_1HTD.transpose(1, 2)


class DecodeAttention:
    """One token of every live sequence attends to that sequence's past; row i of the packed row is ``places[i]``.

    A packed row's order is by adapter, the cache's by bucket and slot: the row (a few kB) is carried from one to the
    other, not the cache. Lives from one change of the live set to the next; :meth:`advance` goes from one position
    to the next.
    """

    def __init__(self, cache: KVCache, places: Sequence[Place], device: torch.device) -> None:
        self._buckets = [bucket for _, bucket in sorted(cache.buckets.items()) if bucket.places]
        self._places = [place for bucket in self._buckets for place in bucket.places]
        row = {id(place): i for i, place in enumerate(places)}
        rows = [row[id(place)] for place in self._places]
        self._rows_C = torch.tensor(rows, device=device)
        self._in_order = rows == list(range(len(rows)))
        self._order_N = torch.argsort(self._rows_C)
        self._positions_C = torch.tensor([place.length for place in self._places], device=device)
        self.positions_N = self._positions_C[self._order_N]
        self._slots = torch.arange(len(places), device=device)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def advance(self) -> None:
        """The row was attended to; the next one is one position further in every sequence."""
        self._positions_C += 1
        self.positions_N += 1
        for place in self._places:
            place.length += 1
        self._masks.clear()

    def __call__(
        self,
        layer: int,
        q_1HND: Tensor,
        k_1GND: Tensor,
        v_1GND: Tensor,
        scores: Scores,
    ) -> Tensor:
        q_NHD, k_NGD, v_NGD = (t[0].transpose(0, 1) for t in (q_1HND, k_1GND, v_1GND))
        scale = scores.scale(q_NHD.shape[-1])
        if fused.serves(q_NHD) and not scores.bent:
            return self._fused(layer, q_NHD, k_NGD, v_NGD, scale, scores.window)[None]
        q_CHD, k_CGD, v_CGD = q_NHD, k_NGD, v_NGD
        if not self._in_order:
            q_CHD, k_CGD, v_CGD = (t.index_select(0, self._rows_C) for t in (q_CHD, k_CGD, v_CGD))
        # The query heads that share keys stand as R queries of one head: nothing has to be repeated.
        q_CGRD = (q_CHD * scale).unflatten(1, (k_CGD.shape[1], -1))
        outputs = []
        for bucket, at in self._stretches():
            k_CGSD, v_CGSD = bucket.layers[layer]
            slots, filled = self._slots[: at.stop - at.start], self._positions_C[at]
            k_CGSD[slots, :, filled] = k_CGD[at]
            v_CGSD[slots, :, filled] = v_CGD[at]
            outputs.append(self._attend(bucket, q_CGRD[at], k_CGSD, v_CGSD, at, scores))
        o_CHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return (o_CHD if self._in_order else o_CHD.index_select(0, self._order_N))[None]

    def _fused(
        self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        o_NHD = q_NHD.new_empty(q_NHD.shape)
        for bucket, at in self._stretches():
            stored = bucket.layers[layer]
            fused.attend(
                q_NHD, k_NGD, v_NGD, *stored, self._rows_C[at], self._positions_C[at], scale, window, o_NHD
            )
        return o_NHD

    def _stretches(self) -> Iterator[tuple[Bucket, slice]]:
        start = 0
        for bucket in self._buckets:
            yield bucket, slice(start, start + len(bucket.places))
            start += len(bucket.places)

    def _attend(
        self, bucket: Bucket, q_CGRD: Tensor, k_CGSD: Tensor, v_CGSD: Tensor, at: slice, scores: Scores
    ) -> Tensor:
        """[C, H, D]. Two matmuls over all slots: the CPU's flash kernel takes two to three times as long here."""
        count, groups = q_CGRD.shape[:2]
        span = max(place.length for place in bucket.places) + 1
        if span * 2 > bucket.size:
            span = (
                bucket.size
            )  # matmuls over whole slots need no strides, which is worth more than the rest of them
        k_XSD, v_XSD = (t[:count].flatten(0, 1)[:, :span] for t in (k_CGSD, v_CGSD))
        products_XRS = torch.bmm(q_CGRD.flatten(0, 1), k_XSD.transpose(1, 2))
        mask = self._mask(bucket, at, span, scores.window, products_XRS.dtype)
        if scores.bent:
            unseen = None if mask is None else mask.expand(-1, groups, -1, -1).flatten(0, 1)
            weights_XRS = scores.weights(products_XRS, unseen, groups)
        else:
            if mask is not None:
                products_XRS.view(count, groups, -1, span).add_(mask)
            weights_XRS = torch.softmax(products_XRS, -1, dtype=torch.float32)
        return torch.bmm(weights_XRS.to(v_XSD.dtype), v_XSD).view(count, -1, q_CGRD.shape[-1])

    def _mask(
        self, bucket: Bucket, at: slice, span: int, window: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """What the slots of a bucket may see of ``span`` positions, 0 or -inf [C, 1, 1, S]; None if all."""
        if (bucket.size, window) not in self._masks:
            mask = None
            if (window or span) < span or any(place.length + 1 < span for place in bucket.places):
                distance_CS = self._positions_C[at, None] - torch.arange(span, device=self._slots.device)
                seen_CS = distance_CS >= 0
                if window is not None:
                    seen_CS &= distance_CS < window
                mask_CS = torch.zeros(seen_CS.shape, dtype=dtype, device=seen_CS.device)
                mask = mask_CS.masked_fill_(~seen_CS, -torch.inf)[:, None, None, :]
            self._masks[bucket.size, window] = mask
        return self._masks[bucket.size, window]
