"""The cache in slots: attention over it equals attention over the whole past, whatever came and went."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuft_jupyter.engine import kv_cache
from tuft_jupyter.engine.kv_cache import DecodeAttention, KVCache, PrefillAttention, blocks

CPU = torch.device("cpu")
H, G, D = 4, 2, 8


def heads(rng: torch.Generator, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a row, [1, heads, N, D]."""
    return tuple(torch.randn(1, n, tokens, D, generator=rng) for n in (H, G, G))  # type: ignore[return-value]


def reference(q_HD: Tensor, k_GTD: Tensor, v_GTD: Tensor, window: int | None) -> Tensor:
    """Attention of the newest token over all of its past, [H, D]."""
    first = 0 if window is None else max(0, k_GTD.shape[1] - window)
    k, v = (t[:, first:].repeat_interleave(H // G, 0) for t in (k_GTD, v_GTD))
    weights = torch.softmax((k @ q_HD[:, :, None])[..., 0] * D**-0.5, -1)
    return (weights[:, None] @ v)[:, 0]


class World:
    """A cache beside a plain record of what every sequence has seen."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.cache = KVCache()
        self.past: list[tuple[Tensor, Tensor]] = []  # by slot: keys and values [G, T, D]

    def prefill(self, lengths: list[int], copies: int) -> None:
        cu = [0]
        slots = []
        for length in lengths:
            cu.append(cu[-1] + length)
            slots.append([self.cache.add(length) for _ in range(copies)])
        q, k, v = heads(self.rng, cu[-1])
        PrefillAttention(self.cache, cu, slots, CPU)(0, q, k, v, None, None)
        for start, end in pairwise(cu):
            self.past += [(k[0, :, start:end], v[0, :, start:end])] * copies

    def drop(self, slot: int) -> None:
        last = self.cache.drop(slot)
        self.past[slot] = self.past[last]
        self.past.pop()

    def decode(self, order: list[int], steps: int, window: int | None) -> None:
        attention = DecodeAttention(self.cache, order, CPU)
        for _ in range(steps):
            assert attention.positions_N.tolist() == [self.past[slot][0].shape[1] for slot in order]
            q, k, v = heads(self.rng, len(order))
            out = attention(0, q, k, v, None, window)
            for row, slot in enumerate(order):
                keys, values = self.past[slot]
                self.past[slot] = keys, values = (
                    torch.cat([keys, k[0, :, row : row + 1]], 1),
                    torch.cat([values, v[0, :, row : row + 1]], 1),
                )
                torch.testing.assert_close(out[0, row], reference(q[0, :, row], keys, values, window))
            attention.advance()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_decoding_equals_attention_over_the_whole_past(data: st.DataObject) -> None:
    world = World(data.draw(st.integers(0, 1000)))
    for _ in range(data.draw(st.integers(1, 4))):
        lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
        world.prefill(lengths, data.draw(st.integers(1, 3)))
        order = data.draw(st.permutations(range(len(world.past))))
        world.decode(list(order), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 2, 50])))
        for _ in range(data.draw(st.integers(0, len(world.past)))):
            world.drop(data.draw(st.integers(0, len(world.past) - 1)))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=64))
def test_blocks_cover_the_slots_in_order_and_waste_little(lengths: list[int]) -> None:
    runs = blocks(lengths)
    assert [start for start, _ in runs] == [0, *(end for _, end in runs[:-1])]
    assert runs[-1][1] == len(lengths)
    for start, end in runs:
        block = lengths[start:end]
        assert max(block) * len(block) <= sum(block) * 1.25 + kv_cache._CALL_COST


def test_equal_lengths_are_one_block() -> None:
    assert blocks([700] * 64) == [(0, 64)]


def test_storage_is_given_back_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_KEEP_BYTES", 0)
    world = World(0)
    world.prefill([400, 3], 2)
    held = world.cache.bytes
    assert held >= 2 * 4 * 400 * G * D * 4
    for _ in range(4):
        assert world.cache.bytes == held
        world.drop(0)
    assert world.cache.bytes == 0
    world.prefill([5], 1)
    world.decode([0], 2, None)
    assert 0 < world.cache.bytes < held
