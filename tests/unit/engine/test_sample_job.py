"""Sharing places between sample requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import SampleRequest, SamplingParams, StopReason
from tuft_jupyter.engine.sample_job import Job, Limits, Live, shares


def job(waiting: int, live: int = 0) -> Job:
    request = SampleRequest(np.array([1], np.int32), waiting + live, SamplingParams(max_tokens=1))
    return Job("", None, request, frozenset(), 1, None, waiting, live)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=9), st.integers(1, 30))
def test_no_place_is_given_twice_and_none_is_left_while_a_job_waits(
    counts: list[tuple[int, int]], places: int
) -> None:
    jobs = [job(waiting, live) for waiting, live in counts if waiting or live]
    free = max(0, places - sum(j.live for j in jobs))
    given_ = shares(jobs, places, free)
    assert all(0 < count <= j.waiting for j, count in given_)
    assert sum(count for _, count in given_) == min(free, sum(j.waiting for j in jobs))


def test_a_large_job_takes_all_places_only_if_nobody_else_can_use_them() -> None:
    large, small = job(100), job(2)
    assert shares([large], 8, 8) == [(large, 8)]
    assert shares([large, small], 8, 8) == [(large, 6), (small, 2)]


def test_a_job_with_its_share_of_places_lets_the_next_ones_pass() -> None:
    large, first, second = job(100, live=7), job(3), job(3)
    assert shares([large, first, second], 9, 2) == [(first, 2)]


def test_samples_are_numbered_in_order() -> None:
    one = job(5)
    assert [*one.begin(2), *one.begin(3)] == [0, 1, 2, 3, 4]
    assert not one.waiting
    assert not one.ended


def test_a_stop_string_is_found_though_the_tokenizer_drops_the_space_that_opens_a_text() -> None:
    request = SampleRequest(
        np.array([1], np.int32), 1, SamplingParams(max_tokens=99, stop_strings=(" x", "\u00e9"))
    )

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")

    live = Live(
        Job("", None, request, frozenset(), 99, decode, 0, 1),
        0,
        np.random.default_rng(0),
        [*b"the quick brown fox "],
    )
    assert live.stop_reason() is None
    live.tokens.append(ord("x"))
    assert live.stop_reason() is StopReason.STOP
    live.tokens = [*"a word with an accent: caf\u00e9".encode()]
    assert live.stop_reason() is StopReason.STOP
    live.tokens.pop()
    assert live.stop_reason() is None, "half of a character is not a character"


def test_what_is_told_of_drawn_tokens_is_bounded_for_all_samples_together() -> None:
    """Each alternative takes a hundred bytes until the request ends: one request could take all of the memory."""
    limits = Limits(vocab_size=2000, context=32768, samples=1024)

    def asked(count: int, k: int, tokens: int | None) -> SampleRequest:
        params = SamplingParams(max_tokens=tokens)
        return SampleRequest(np.array([1], np.int32), count, params, topk_sample_logprobs=k)

    for fits in (asked(16, 16, None), asked(1024, 1024, 8), asked(1024, 0, None)):
        limits.check(fits)
    for too_much in (asked(1024, 1024, 9), asked(16, 20, None)):
        with pytest.raises(UserError, match=r"topk_sample_logprobs: .* set max_tokens"):
            limits.check(too_much)
