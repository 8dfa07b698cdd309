"""Sample requests and answers, with the SDK's own types and decoder as the oracle."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types as sdk
from tinker.proto.response_conv import deserialize_sample_response

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import SampledSequence, SampleResult, StopReason
from tuft_jupyter.wire import codec


def sample_result(**prompt: Any) -> SampleResult:
    return SampleResult(
        sequences=[
            SampledSequence(np.array([5, 6], np.int32), np.array([-0.5, -0.25], np.float32), StopReason.STOP),
            SampledSequence(np.array([7], np.int32), np.array([-2.0], np.float32), StopReason.LENGTH),
        ],
        **prompt,
    )


def test_the_sdk_reads_back_samples_and_prompt_logprobs() -> None:
    mask = -99999.0
    answer = deserialize_sample_response(
        codec.encode_sample_response(
            sample_result(
                prompt_logprobs=np.array([np.nan, -1.0, -2.0], np.float32),
                topk_prompt_ids=np.array([[0, 0], [3, 4], [5, 6]], np.int32),
                topk_prompt_logprobs=np.array([[mask, mask], [-1, -2], [-0.5, -3]], np.float32),
            )
        )
    )
    assert [s.tokens for s in answer.sequences] == [[5, 6], [7]]
    assert [s.logprobs for s in answer.sequences] == [[-0.5, -0.25], [-2.0]]
    assert [s.stop_reason for s in answer.sequences] == ["stop", "length"]
    assert answer.prompt_logprobs == [None, -1.0, -2.0]
    assert answer.topk_prompt_logprobs == [None, [(3, -1.0), (4, -2.0)], [(5, -0.5), (6, -3.0)]]


def test_what_was_not_asked_for_is_absent() -> None:
    answer = deserialize_sample_response(codec.encode_sample_response(sample_result()))
    assert answer.prompt_logprobs is None
    assert answer.topk_prompt_logprobs is None


def test_samples_in_json_for_older_sdks() -> None:
    answer = json.loads(
        codec.sample_response_as_json(
            codec.encode_sample_response(
                sample_result(
                    prompt_logprobs=np.array([np.nan, -1.0], np.float32),
                    topk_prompt_ids=np.array([[0, 0], [3, 4]], np.int32),
                    topk_prompt_logprobs=np.array([[-99999.0, -99999.0], [-1.0, -2.0]], np.float32),
                )
            )
        )
    )
    assert answer["sequences"][0] == {"stop_reason": "stop", "tokens": [5, 6], "logprobs": [-0.5, -0.25]}
    assert answer["prompt_logprobs"] == [None, -1.0]
    assert answer["topk_prompt_logprobs"] == [None, [[3, -1.0], [4, -2.0]]]


def test_samples_in_json_leave_out_what_was_not_asked_for() -> None:
    answer = json.loads(codec.sample_response_as_json(codec.encode_sample_response(sample_result())))
    assert set(answer) == {"type", "sequences"}


# ---- sample requests


def sample_body(params: dict[str, Any] | None = None, **fields: Any) -> bytes:
    return json.dumps(
        {
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}, {"tokens": [3]}]},
            "sampling_params": params or {},
            "sampling_session_id": "s:sample:0",
            "seq_id": 0,
            "topk_sample_logprobs": 0,
            "prompt_alt_tokens_k": 0,
            "record_stability_info": True,
            "type": "sample",
            **fields,
        }
    ).encode()


def decode_sample(params: dict[str, Any] | None = None, **fields: Any) -> Any:
    return codec.decode_sample_request(sample_body(params, **fields))


def test_a_sample_request_of_the_sdk_is_read_as_it_was_meant() -> None:
    body = sdk.SampleRequest(
        num_samples=3,
        prompt=sdk.ModelInput.from_ints([4, 5]),
        sampling_params=sdk.SamplingParams(
            max_tokens=3, seed=2**64 - 1, stop=["\n\n"], temperature=0.7, top_k=5, top_p=0.9
        ),
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).model_dump_json()
    request = codec.decode_sample_request(body.encode())
    assert request.prompt.tolist() == [4, 5]
    assert (request.num_samples, request.prompt_logprobs, request.topk_prompt_logprobs) == (3, True, 2)
    params = request.params
    assert (params.max_tokens, params.seed, params.temperature) == (3, 2**64 - 1, 0.7)
    assert (params.top_k, params.top_p) == (5, 0.9)


def test_what_a_sample_request_leaves_out_has_the_protocols_meaning() -> None:
    request = decode_sample()
    assert request.prompt.tolist() == [1, 2, 3]
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (None, 1.0, -1, 1.0)
    assert (params.seed, params.stop_tokens, params.stop_strings) == (None, None, ())


@pytest.mark.parametrize(
    ("stop", "tokens", "strings"),
    [
        (None, None, ()),
        ([], (), ()),
        ([7, 8], (7, 8), ()),
        ("###", None, ("###",)),
        (["a", "b"], None, ("a", "b")),
    ],
)
def test_every_form_of_stop_is_understood(stop: Any, tokens: Any, strings: Any) -> None:
    params = decode_sample({"stop": stop}).params
    assert (params.stop_tokens, params.stop_strings) == (tokens, strings)


@pytest.mark.parametrize("fields", [{"unheard_of": {"x": 1}}, {"prompt_logprobs_last_n": None}])
def test_fields_of_later_sdks_do_not_disturb(fields: dict[str, Any]) -> None:
    assert decode_sample({"later": 0, "penalty": 1.0, "limit": -1, "bias": {}}, **fields).num_samples == 2


@pytest.mark.parametrize(
    ("params", "fields", "words"),
    [
        ({"repetition_penalty": 1.2}, {}, "repetition_penalty is not known"),
        ({"beam_search": True}, {}, "beam_search is not known"),
        ({"max_tokens": 0}, {}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, {}, "temperature"),
        ({"top_k": -2}, {}, "top_k"),
        ({"top_k": 2**63, "top_p": 0.9}, {}, "top_k"),
        ({"stop": [2**63]}, {}, "stop.*int32"),
        ({"top_p": 0}, {}, "top_p"),
        ({"seed": -1}, {}, "seed"),
        ({"seed": 2**64}, {}, "seed"),
        ({"stop": ["a", 1]}, {}, "stop"),
        ({"stop": [""]}, {}, "stop"),
        ({"max_tokens": "many"}, {}, "max_tokens"),
        ({}, {"num_samples": 0}, "num_samples"),
        ({}, {"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({}, {"prompt": {"chunks": []}}, "prompt is empty"),
        ({}, {"prompt": {"chunks": [{"type": "image", "data": ""}]}}, r"prompt.chunks\[0\].*image"),
        ({}, {"prompt": {"chunks": [{"tokens": [2**40]}]}}, "int32"),
        ({}, {"prompt": 5}, "prompt"),
    ],
)
def test_a_wrong_sample_request_is_refused_by_name(params: Any, fields: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        decode_sample(params, **fields)
    assert caught.value.status < 500, "the SDK repeats a 5xx for ever"


@pytest.mark.slow
@given(
    st.binary(max_size=100)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
        lambda value: sample_body({"stop": value, "seed": value}, num_samples=value)
    )
)
def test_odd_sample_requests_only_ever_raise_user_errors(body: bytes) -> None:
    with contextlib.suppress(UserError):
        codec.decode_sample_request(body)
