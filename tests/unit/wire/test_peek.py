"""Reading the head of a body: bounded, quick, and of one mind with the whole decoding."""

from __future__ import annotations

import contextlib
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.sdk_bodies import RUN, sdk_body, sdk_datum
from tuft_jupyter.core.errors import TooLarge, UserError
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire import codec
from tuft_jupyter.wire.peek import MAX_DATUMS, MAX_FIELDS, Peek


def test_the_peek_agrees_with_the_whole_request() -> None:
    body = sdk_body([sdk_datum(n) for n in (1, 200, 3)], "ppo", {"a": 1.0}, forward_only=True)
    assert codec.peek_forward_backward(body) == Peek(RUN, 7, 204, 3, True, "ppo")


def test_the_peek_does_not_pay_for_the_contents_of_tensors() -> None:
    small = sdk_body([sdk_datum(2)] * 16)
    large = sdk_body([sdk_datum(4096)] * 16)

    def cost(body: bytes) -> float:
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            codec.peek_forward_backward(body)
            best = min(best, time.perf_counter() - start)
        return best

    assert len(large) > 100 * len(small)
    assert cost(large) < 5 * cost(small)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x0a",
        b"\x0a\x05ab",  # a length beyond the end
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7fab",  # an absurd length
        b"\x0a" + b"\xff" * 30,  # a varint without end
        b"\x0a\x02\xff\xfe\x1a\x00",  # model_id that is not UTF-8
        b"\x0a\x01m\x12\x01x\x1a\x00",  # seq_id as bytes
        b"\x0a\x01m\x18\x05",  # data as a number
        b"\x0a\x01m\x1b\x1c",  # groups
        b"\x0a\x01m\x1e",  # wire type 6
        b"\x02\x01m",  # field number 0
        b"\x0a\x01m\x1a\x02\x08\x01",  # model_input as a number
    ],
)
def test_malformed_protobuf_is_a_user_error(body: bytes) -> None:
    for read in (codec.peek_forward_backward, codec.decode_forward_backward):
        with pytest.raises(UserError):
            read(body)


def test_the_number_of_datums_and_of_fields_is_bounded() -> None:
    head = b"\x0a\x01m"
    for body in (b"\x1a\x00" * (MAX_DATUMS + 1), b"\x22\x00" * (MAX_FIELDS + 1)):
        start = time.perf_counter()
        with pytest.raises(TooLarge, match="fewer"):
            codec.peek_forward_backward(head + body)
        assert time.perf_counter() - start < 1.0


@given(st.binary(max_size=200))
def test_random_bytes_only_ever_raise_user_errors(body: bytes) -> None:
    for content_type in (PROTOBUF, JSON):
        for read in (codec.peek_forward_backward, codec.decode_forward_backward):
            with contextlib.suppress(UserError):
                read(body, content_type)


SEED_BODY = sdk_body(
    [sdk_datum(target_tokens=torch.eye(5, 12, dtype=torch.int64), weights=np.ones(5)), sdk_datum()],
    "ppo",
    {"x": 1.0, "y": "z"},
)


@given(
    st.lists(st.tuples(st.integers(0, len(SEED_BODY) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, len(SEED_BODY)),
)
@settings(max_examples=400)
def test_damaged_requests_only_ever_raise_user_errors_and_the_two_readers_agree(
    edits: list[tuple[int, int]], cut: int
) -> None:
    body = bytearray(SEED_BODY)
    for at, value in edits:
        body[at] = value
    for damaged in (bytes(body), bytes(body[:cut])):
        try:
            request = codec.decode_forward_backward(damaged)
        except UserError:
            continue
        peek = codec.peek_forward_backward(damaged)
        assert peek.data_count == len(request.data)
        assert peek.tokens == sum(datum.tokens.size for datum in request.data)
        assert peek.forward_only is not request.backward
