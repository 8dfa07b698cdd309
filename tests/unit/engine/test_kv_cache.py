"""The cache: attention over it equals attention over the whole past, whatever came and went; its budget is kept to."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuft_jupyter.engine import fused, kv_cache
from tuft_jupyter.engine.attention import Scores
from tuft_jupyter.engine.kv_cache import (
    DecodeAttention,
    KVCache,
    Place,
    PrefillAttention,
    Strip,
    slot_size,
)

CPU = torch.device("cpu")
H, G, D = 4, 2, 8
SINKS = torch.tensor([-1.0, 0.0, 2.0, 5.0])


def heads(rng: torch.Generator, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a row, [1, heads, N, D]."""
    return tuple(torch.randn(1, n, tokens, D, generator=rng) for n in (H, G, G))  # type: ignore[return-value]


def reference(q_HND: Tensor, k_GTD: Tensor, v_GTD: Tensor, how: Scores) -> Tensor:
    """Attention of the newest N tokens, each over all of its past, [N, H, D]."""
    n, t = q_HND.shape[1], k_GTD.shape[1]
    k, v = (each.repeat_interleave(H // G, 0) for each in (k_GTD, v_GTD))
    ago = torch.arange(t - n, t)[:, None] - torch.arange(t)
    unseen = (ago < 0) | (ago >= (t if how.window is None else how.window))
    scores = q_HND @ k.mT * D**-0.5
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(unseen, -torch.inf)
    if how.sinks is not None:  # one key more, which brings nothing
        scores = torch.cat([scores, how.sinks.view(H, 1, 1).expand(-1, n, -1)], -1)
    return (torch.softmax(scores, -1)[..., :t] @ v).transpose(0, 1)


class World:
    """A cache beside a plain record of what every sequence has seen."""

    def __init__(self, seed: int, budget: int | None = None) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.cache = KVCache(budget)
        self.past: dict[Place, tuple[Tensor, Tensor]] = {}  # keys and values [G, T, D]

    def prefill(self, lengths: list[int], copies: int, piece: int, how: Scores) -> None:
        """Run prompts side by side, ``piece`` tokens of each at a time."""
        strips = [Strip(length) for length in lengths]
        seen = [(torch.empty(G, 0, D), torch.empty(G, 0, D)) for _ in lengths]
        while any(strip.done < strip.positions for strip in strips):
            row = [i for i, strip in enumerate(strips) if strip.done < strip.positions]
            counts = [min(piece + i, strips[i].positions - strips[i].done) for i in row]
            cu = [0, *accumulate(counts)]
            attention = PrefillAttention([strips[i] for i in row], cu, CPU)
            q, k, v = heads(self.rng, cu[-1])
            out = attention(0, q, k, v, how)
            attention.advance()
            for i, (start, end) in zip(row, pairwise(cu), strict=True):
                seen[i] = keys, values = (
                    torch.cat([seen[i][0], k[0, :, start:end]], 1),
                    torch.cat([seen[i][1], v[0, :, start:end]], 1),
                )
                wanted = reference(q[0, :, start:end], keys, values, how)
                torch.testing.assert_close(out[0, start:end], wanted)
        for strip, held in zip(strips, seen, strict=True):
            for _ in range(copies):
                assert self.cache.take(slot_size(strip.done + 1))
                self.past[self.cache.begin(strip)] = held

    def drop(self, place: Place) -> None:
        self.cache.drop(place)
        del self.past[place]

    def decode(self, order: list[Place], steps: int, how: Scores) -> None:
        for _ in range(steps):
            for place in order:
                if place.full:
                    assert self.cache.take(slot_size(place.length + 1))
                    self.cache.move(place, slot_size(place.length + 1))
            attention = DecodeAttention(self.cache, order, CPU)
            assert attention.positions_N.tolist() == [self.past[place][0].shape[1] for place in order]
            q, k, v = heads(self.rng, len(order))
            out = attention(0, q, k, v, how)
            for row, place in enumerate(order):
                keys, values = self.past[place]
                self.past[place] = keys, values = (
                    torch.cat([keys, k[0, :, row : row + 1]], 1),
                    torch.cat([values, v[0, :, row : row + 1]], 1),
                )
                wanted = reference(q[0, :, row : row + 1], keys, values, how)
                torch.testing.assert_close(out[0, row : row + 1], wanted)
            attention.advance()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one pass", "matmuls"])
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_attention_over_the_cache_equals_attention_over_the_whole_past(how: str, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if how == "matmuls":
            patched.setattr(fused, "serves", lambda t: False)
        come_and_go(data)


def come_and_go(data: st.DataObject) -> None:
    world = World(data.draw(st.integers(0, 1000)))
    window = data.draw(st.sampled_from([None, 2, 50]))
    softcap = data.draw(st.sampled_from([None, None, 0.7]))
    how = Scores(None, window, softcap, data.draw(st.sampled_from([None, None, SINKS])))
    for _ in range(data.draw(st.integers(1, 4))):
        lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
        world.prefill(lengths, data.draw(st.integers(1, 3)), data.draw(st.sampled_from([7, 60, 999])), how)
        order = data.draw(st.permutations(list(world.past)))
        world.decode(list(order), data.draw(st.integers(1, 3)), how)
        for _ in range(data.draw(st.integers(0, len(world.past)))):
            world.drop(data.draw(st.sampled_from(list(world.past))))


def test_what_diverged_leaves_nothing_to_who_comes_after() -> None:
    world = World(3)
    world.prefill([100, 90, 80], 1, 999, Scores())
    first, second, _ = world.past
    for place in (first, second):
        for tensor in place.bucket.layers[0]:
            tensor[place.slot] = torch.nan
    world.drop(first)
    world.drop(second)
    world.prefill([10, 20], 1, 999, Scores())
    world.decode(list(world.past), 3, Scores())


def test_a_sequence_that_outgrows_its_slot_moves_to_a_larger_one() -> None:
    world = World(1)
    world.prefill([126, 30], 2, 999, Scores())
    world.decode(list(world.past), 70, Scores())
    assert sorted(place.bucket.size for place in world.past) == [128, 128, 256, 256]
    assert world.cache.taken == 2 * 128 + 2 * 256


@given(st.integers(1, 100_000))
def test_slots_waste_at_most_a_third(length: int) -> None:
    assert length <= slot_size(length) <= max(128, length * 1.5)


def test_storage_never_passes_the_budget_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_KEEP_BYTES", 0)
    world = World(0, budget=1400)
    each = 2 * G * D * 4  # bytes of one position in the only layer
    world.prefill([100] * 5, 1, 999, Scores())  # five slots of 128, room for eight would be 1024
    for place in list(world.past)[:3]:
        world.drop(place)
    world.prefill([300, 150], 1, 999, Scores())  # 384 + 192
    assert world.cache.taken == 2 * 128 + 384 + 192
    assert world.cache.bytes <= 1400 * each
    assert not world.cache.take(1400 - world.cache.taken + 1)
    world.decode(list(world.past), 2, Scores())
    for place in list(world.past):
        world.drop(place)
    assert world.cache.taken == world.cache.bytes == 0


def test_a_budget_too_small_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 512 tokens, got 100"):
        KVCache(100)
